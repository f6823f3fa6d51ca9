"""Each configuration of recipes/accelerate trains the weights that one process trains."""

from dataclasses import dataclass, field

import pytest
import torch
import yaml

from tests.distributed import recipe
from tests.distributed.launch import ROOT
from tests.integration.tiny import largest_difference

FULL = pytest.mark.full
CONFIGS = ROOT / "recipes" / "accelerate"
SHARDED = "(Shard(dim=0),)"


@dataclass(frozen=True)
class Launch:
    """How a configuration is launched, and what has to come of it."""

    processes: int
    type: str
    share: float = 1  # of the optimizer's state, held by one process
    script: list[str] = field(default_factory=lambda: recipe.RUN)
    layout: dict | None = None


def zero():
    return Launch(2, "DEEPSPEED", 1 / 2)


def fsdp(*mesh, placements=SHARDED):
    layout = {"mesh": list(mesh), "placements": placements}
    processes = torch.Size(mesh).numel()
    return Launch(processes, "FSDP", 1 / mesh[-1], recipe.ON_FSDP, layout)


LAUNCHES = {
    "cpu": Launch(1, "NO"),
    "ddp": Launch(2, "MULTI_CPU"),
    "zero1": zero(),
    "zero2": zero(),
    "zero3": zero(),
    "zero2_offload": zero(),
    "fsdp2": fsdp(2),
    "fsdp2_offload": fsdp(2),
    "hsdp": fsdp(2, 2, placements="(Replicate(), Shard(dim=0))"),
}
QUICK = ("ddp",)
MULTI_NODE = ("multi_node_fsdp2", "multi_node_zero3")  # test_multi_node.py


class Runs:
    """Launches, each made once."""

    def __init__(self, folder):
        self.folder, self.finished = folder, {}

    def __call__(self, config):
        if config not in self.finished:
            self.finished[config] = self.launch(config)
        return self.finished[config]

    def launch(self, config):
        if config not in LAUNCHES:
            return recipe.alone(self.folder / config)
        launch = LAUNCHES[config]
        options = ["--num_processes", str(launch.processes), "--main_process_port", "0"]
        command = recipe.accelerate(config, *options) + launch.script
        expected = {"expected_world_size": launch.processes}
        return recipe.train(self.folder / config, command, **expected)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(runs):
    return runs("alone")


@pytest.fixture(params=[pytest.param(c, marks=() if c in QUICK else FULL) for c in LAUNCHES])
def config(request):
    return request.param


def test_the_launch_is_what_was_asked_for(config, runs):
    launch, results = LAUNCHES[config], runs(config).results
    assert results["world_size"] == launch.processes
    assert results["distributed_type"] == launch.type
    assert results["tokens"] == 3 * recipe.SMALL["tokens_per_step"]
    assert results["training_arguments"]["gradient_accumulation_steps"] * launch.processes == 8


def test_the_same_weights_are_trained(config, runs, alone):
    run = runs(config)
    # Gradients are averaged in another order: float32 roundings, here at most 1e-6 in a loss and
    # 1.2e-7 in a weight. A final loss that counts repeated blocks would be 1e-3 off.
    assert (run.losses() - alone.losses()).abs().max() < 1e-5
    assert largest_difference(run.weights, alone.weights) < 2e-6


def test_a_process_holds_its_share_of_the_state(config, runs, alone):
    held, whole = (run.results["optimizer_state_bytes"] for run in (runs(config), alone))
    # The counters of the steps are not sharded, and a shard may be padded by some bytes.
    assert held / whole == pytest.approx(LAUNCHES[config].share, rel=2e-3)


@FULL
@pytest.mark.parametrize("config", [c for c in LAUNCHES if LAUNCHES[c].layout])
def test_parameters_are_sharded_as_configured(config, runs):
    layout = runs(config).layout
    assert layout.pop("parameters") == len(runs(config).weights)
    assert layout == LAUNCHES[config].layout


@FULL
@pytest.mark.parametrize("wrong", [{"tokens_per_step": 2048}, {"learning_rate": 1.61e-2}])
def test_other_weights_are_told_apart(wrong, alone, tmp_path):
    other = recipe.alone(tmp_path / "other", **wrong)
    assert (other.losses() - alone.losses()).abs().max() > 1e-3
    assert largest_difference(other.weights, alone.weights) > 1e-4


def test_every_configuration_is_tested_and_explained():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {*LAUNCHES, *MULTI_NODE}
    readme = (CONFIGS / "README.md").read_text()
    assert all(f"{name}.yaml" in readme for name in names)


def test_the_trainers_values_reach_deepspeed():
    for path in CONFIGS.glob("*zero*.yaml"):
        settings = yaml.safe_load(path.read_text())["deepspeed_config"]
        if "deepspeed_config_file" in settings:
            settings = yaml.safe_load((ROOT / settings["deepspeed_config_file"]).read_text())
        assert settings["gradient_accumulation_steps"] == "auto"
        assert settings["gradient_clipping"] == "auto"
        assert "optimizer" not in settings


# Launches of which accelerate or torch make something else without a word: the configuration, the
# launcher's and the recipe's options, the environment, and what the recipe says.
SILENT = {
    "one process of two": ("cpu", ["--cpu"], {}, {}, "has started one"),
    "a configuration for one": ("cpu", [], {}, {}, "has started one"),
    "processes that never meet": ("ddp", [], {"use_cpu": False}, {}, "but 1 train together"),
    "DDP instead of FSDP": ("fsdp2", [], {}, {}, "FSDP was launched, but"),
    "DDP instead of ZeRO": (
        "zero2",
        [],
        {},
        {"ACCELERATE_USE_CPU": "true"},
        "DeepSpeed was launched, but",
    ),
}


@FULL
@pytest.mark.parametrize("form", SILENT)
def test_a_launch_that_became_another_one_is_refused(form, tmp_path):
    config, options, overrides, variables, message = SILENT[form]
    options = ["--num_processes", "2", "--main_process_port", "0", *options]
    command = recipe.accelerate(config, *options) + recipe.RUN
    command += recipe.settings(tmp_path / "out", **overrides)
    ((status, output),) = recipe.run_together([command], tmp_path / "out", [variables])
    assert status != 0
    assert any(line.startswith("error: ") and message in line for line in output.splitlines()), (
        output[-3000:]
    )
    assert not (tmp_path / "out" / "results.json").exists()
