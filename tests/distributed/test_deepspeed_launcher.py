"""DeepSpeed's own launcher trains the weights that accelerate's launcher trains."""

import json
import sys

import pytest
import yaml

from tests.distributed import recipe
from tests.distributed.launch import ROOT, free_port
from tests.integration.tiny import largest_difference

FILES = ROOT / "recipes" / "deepspeed"
STAGES = (1, 2, 3)


def start(folder, stage, **overrides):
    """Train on two processes of DeepSpeed's launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    launcher += ["--num_gpus", "2", "--master_port", str(free_port())]
    options = {"deepspeed": str(FILES / f"zero{stage}.json"), "expected_world_size": 2}
    return recipe.train(folder, launcher + recipe.RUN, **options, **overrides)


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_the_launchers_train_the_same_weights(stage, tmp_path):
    options = ["--num_processes", "2", "--main_process_port", "0"]
    command = recipe.accelerate(f"zero{stage}", *options) + recipe.RUN
    expected = recipe.train(tmp_path / "accelerate", command, expected_world_size=2)
    run = start(tmp_path / "deepspeed", stage)
    assert run.results["world_size"] == 2
    assert run.results["distributed_type"] == "DEEPSPEED"
    assert largest_difference(run.weights, expected.weights) == 0
    assert run.results["optimizer_state_bytes"] == expected.results["optimizer_state_bytes"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_files_say_what_accelerates_say(stage):
    own = json.loads((FILES / f"zero{stage}.json").read_text())
    path = ROOT / "recipes" / "accelerate" / f"zero{stage}.yaml"
    other = yaml.safe_load(path.read_text())["deepspeed_config"]
    assert own["zero_optimization"]["stage"] == other["zero_stage"] == stage
    saves = own["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False)
    assert saves == other.get("zero3_save_16bit_model", False)
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        assert own[key] == other[key] == "auto"
    assert "optimizer" not in own
