"""The LoRA recipe: what it refuses, in sentences that say what to do."""

import os
import subprocess
import sys

import pytest

from tests.integration.test_recipe_lora import (
    RECIPE,
    RecipeError,
    assets,
    needs_assets,
    run,
    settings,
    tweets,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "clasification"], r"Unknown task 'clasification'. Did you mean 'classif"),
        (["--r", "0"], r"r=0 must be at least 1"),
        (["--loraplus_ratio", "16"], r"optim='muon' was asked for. Use --optim adamw_torch"),
        (["--resume_from_checkpoint", "last", "--output_dir", "nowhere"], "no whole checkpoint in"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        run.checkpoint(settings.parse(["configs/minilm_sentiment.yaml", *options])[2])


def test_unknown_names_are_refused_with_the_nearest_one(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("learning_rat: 0.1\n")
    with pytest.raises(RecipeError, match="Did you mean 'learning_rate'"):
        settings.parse([str(wrong)])
    wrong.write_text("- task")
    with pytest.raises(RecipeError, match=r"wrong.yaml holds a list"):
        settings.parse([str(wrong)])
    with pytest.raises(RecipeError, match=r"No configuration file 'configs/big.yaml'.*smollm2_s"):
        settings.parse(["configs/big.yaml"])
    with pytest.raises(RecipeError, match=r"Unknown model 'minillm'. Did you mean 'minilm'"):
        assets.source("minillm")


@needs_assets
def test_more_rows_than_there_are_tweets_are_refused():
    with pytest.raises(RecipeError, match=r"too few for 1,000 validation rows and 90,000"):
        tweets.load(train_rows=90_000)


def test_missing_assets_name_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MUON_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match=r"prepare_assets\.py --only smollm2"):
        assets.source("smollm2")
    monkeypatch.setattr("shared.assets.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"prepare_assets\.py --only minilm"):
        assets.source("minilm")
    with pytest.raises(RecipeError, match=r"prepare_assets\.py --only tweets"):
        tweets.load()


def test_a_mistake_ends_in_one_sentence():
    command = [sys.executable, RECIPE / "run.py", "configs/minilm_sentiment.yaml", "--r", "0"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 1
    assert outcome.stderr.strip().splitlines()[-1].startswith("error: r=0 must be at least 1")


@pytest.mark.parametrize(
    "config", sorted((RECIPE / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_configuration_parses(config):
    model, _, args, _ = settings.parse([str(config), "--use_cpu", "true", "--bf16", "false"])
    assert args.optim == "muon"
    assert model.task in settings.TASKS
    assert args.output_dir.endswith(f"{config.stem}_muon")
