"""What the quickstart says at its end is computed from what it has measured."""

import json
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.progress import Progress

from tests.distributed.launch import ROOT
from tests.integration.recipes import import_recipe

recipe = import_recipe("llama_pretrain")
conclusion, compare, launch = (recipe[name] for name in ("conclusion", "compare", "launch"))


def results(losses, **more):
    curve = [{"step": n, "tokens": 100 * n, "loss": loss} for n, loss in enumerate(losses)]
    found = {"eval_curve": curve, "tokens": 100 * (len(losses) - 1), "seed": 0}
    found |= {"final_validation_loss": losses[-1] + 0.01, "learning_rate": 0.01}
    return found | more


CASES = {
    "reached": ([6, 4, 3], [6, 5, 4], "Muon reached AdamW's final loss after 50% of the tokens."),
    "not": (
        [6, 5, 4], [6, 4, 3],
        "Muon did not reach AdamW's final loss; AdamW reached Muon's after 50% of the tokens.",
    ),
    "neither": ([3, 5, 4], [2, 6, 3.5], "Muon did not reach AdamW's final loss"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_conclusion_follows_from_the_curves(case):
    muon, adamw, said = CASES[case]
    text = conclusion.conclusion({"muon": results(muon), "adamw": results(adamw)})
    assert text.startswith(said)
    assert f"Muon {muon[-1] + 0.01:.4f}, AdamW {adamw[-1] + 0.01:.4f}." in text


def test_nothing_is_concluded_from_other_than_two_curves():
    assert conclusion.conclusion({"muon": results([6, 5])}) == ""
    assert (
        conclusion.conclusion({"a": results([6, 5]), "b": results([1]) | {"eval_curve": []}}) == ""
    )


def test_what_it_does_not_show_is_said_with_both_rates():
    runs = {"muon": results([6, 5]), "adamw": results([6, 5], other_learning_rate=0.016)}
    text = conclusion.caveat(runs)
    assert "One run of each, seed 0" in text
    assert "Muon 0.01 and 0.01; AdamW 0.01 and 0.016" in text


def test_adamw_has_a_rate_of_its_own_for_embeddings():
    options = compare.best_options(ROOT / "recipes/llama_pretrain/configs/tiny.yaml")
    assert set(options) == {"muon", "adamw"}
    for of_arm in options.values():
        assert {"learning_rate", "other_learning_rate"} <= set(of_arm)
    assert options["adamw"]["other_learning_rate"] > options["adamw"]["learning_rate"]


def test_the_comparison_writes_a_page_and_says_where(tmp_path, capsys):
    runs = {}
    for label, losses in (("muon", [6, 4, 3]), ("adamw", [6, 5, 4])):
        found = results(losses, optim=label, model={"parameters": 1_300_000}, train_curve=[])
        found |= {"data": {"corpus": "plays"}, "tokens_per_second": 9.0, "optimizer_share": None}
        found |= {"optimizer_state_bytes": 5e6, "sample": {"prompt": "To be,", "written": " or"}}
        (tmp_path / label).mkdir()
        (tmp_path / label / "results.json").write_text(json.dumps(found))
        runs[label] = found
    compare.report(runs, {label: tmp_path / label for label in runs}, tmp_path)
    shown = capsys.readouterr().out
    assert "    To be,┃ or" in shown
    assert "Muon reached AdamW's final loss after 50% of the tokens." in shown
    page = (tmp_path / "board.html").read_text()
    assert str(tmp_path / "board.html") in shown
    assert "Muon reached AdamW&#x27;s final loss after 50% of the tokens." in page
    assert "LLaMA of 1.30 M parameters, plays, 200 tokens" in page
    assert max(map(len, re.findall(".*(?:reached|One run).*", shown))) <= compare.WIDTH


def test_a_log_gets_a_line_for_each_run_every_few_seconds(monkeypatch, capsys):
    monkeypatch.setattr(launch, "EVERY", 0.05)
    progress, may_end = Progress(), threading.Event()
    read = launch.follow(progress, "muon")
    with ThreadPoolExecutor(1) as pool:
        started = [pool.submit(may_end.wait, 0.2)]
        read("step 3/122: loss 5.000\n")
        launch.print_states(started, progress)
    assert re.search(r"^muon: step 3/122, loss 5.000 \(\d+ s\)$", capsys.readouterr().out, re.M)
    read("evaluating on 146,560 held-out tokens\n")
    assert progress.tasks[0].fields["losses"] == "evaluating on 146,560 held-out tokens"
    read("muon: validation loss 4.0747, 973 tokens/s; out/results.json\n")
    assert progress.tasks[0].fields["losses"] == "muon: validation loss 4.0747, 973 tokens/s"


@pytest.mark.parametrize("status", [0, 7])
def test_pip_is_followed_and_its_failure_is_shown(tmp_path, status):
    for file in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho ERROR: no such wheel\nsleep 0.2\nexit {status}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", tmp_path / "scripts/setup.sh", "recipes"], capture_output=True, text=True
    )
    assert done.returncode == status
    assert "Installing torch and hf_muon[recipes]" in done.stdout
    assert (tmp_path / ".venv/.installed-recipes").exists() == (status == 0)
    assert ("ERROR: no such wheel" in done.stderr) == (status != 0)
    assert ("error: pip could not install torch" in done.stderr) == (status != 0)
