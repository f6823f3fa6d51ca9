"""A launch that did not become what was asked for ends in one sentence, before it trains.

Whole launches are in ``tests/distributed/test_accelerate_configs.py``.
"""

from types import SimpleNamespace

import pytest

from tests.integration.recipes import import_recipe

recipe = import_recipe("llama_pretrain")
run, settings = recipe["run"], recipe["settings"]
TINY = "configs/tiny.yaml"
ANNOUNCED = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")
# What accelerate's launcher sets when it starts one process of several.
ALONE = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ANNOUNCED:
        monkeypatch.delenv(name, raising=False)


def announce(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_do_not_meet_are_refused(variable, monkeypatch):
    announce(monkeypatch, **{variable: "2"})
    with pytest.raises(settings.RecipeError, match=r"2 processes .* but 1 train together"):
        settings.parse([TINY, "--use_cpu", "false"])


def test_one_process_of_several_is_refused(monkeypatch):
    announce(monkeypatch, **ALONE)
    with pytest.raises(settings.RecipeError, match=r"asked for several .* has started one"):
        settings.parse([TINY])


@pytest.mark.parametrize("missing", ALONE)
def test_one_process_that_was_asked_for_trains(missing, monkeypatch):
    announce(monkeypatch, **ALONE)
    assert settings.parse([TINY, "--expected_world_size", "1"])[2].world_size == 1
    monkeypatch.delenv(missing)
    assert settings.parse([TINY])[2].world_size == 1


def test_one_process_with_several_gpus_is_refused():
    seen = SimpleNamespace(world_size=1, n_gpu=4)
    with pytest.raises(settings.RecipeError, match=r"4 GPUs.*--nproc_per_node 4"):
        settings.check_world_size(seen)
    settings.check_world_size(SimpleNamespace(world_size=1, n_gpu=1))


@pytest.mark.parametrize(
    ("variable", "taken", "message"),
    [
        ("ACCELERATE_USE_FSDP", "is_fsdp_enabled", "FSDP was launched.*DDP on this device, cpu"),
        ("ACCELERATE_USE_DEEPSPEED", "is_deepspeed_enabled", "DeepSpeed was launched"),
    ],
)
def test_sharding_that_became_ddp_is_refused(variable, taken, message, monkeypatch):
    trainer = SimpleNamespace(
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        args=SimpleNamespace(device=SimpleNamespace(type="cpu")),
    )
    run.check_sharding(trainer)
    announce(monkeypatch, **{variable: "true"})
    with pytest.raises(settings.RecipeError, match=message):
        run.check_sharding(trainer)
    setattr(trainer, taken, True)
    run.check_sharding(trainer)


def counts(**overrides):
    values = {"seq_len": 128, "per_device_train_batch_size": 16, "tokens_per_step": 8192}
    values |= {"max_steps": 3} | overrides
    settings.set_step_counts(values)
    return values


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_step_has_the_same_tokens_on_any_number_of_processes(processes, monkeypatch):
    announce(monkeypatch, WORLD_SIZE=str(processes))
    assert counts()["gradient_accumulation_steps"] * processes == 4


@pytest.mark.parametrize(
    ("processes", "overrides", "remedy"),
    [
        (8, {}, "--per_device_train_batch_size 8"),
        (4, {"per_device_train_batch_size": 12}, "--per_device_train_batch_size 8"),
        (3, {}, "--tokens_per_step 6144"),  # no batch divides the step by three
        (128, {}, "--tokens_per_step 262144"),  # not even one sequence each
    ],
)
def test_a_step_that_does_not_divide_is_refused_with_a_remedy(
    processes, overrides, remedy, monkeypatch
):
    announce(monkeypatch, WORLD_SIZE=str(processes))
    with pytest.raises(settings.RecipeError, match=remedy):
        counts(**overrides)
    name, value = remedy.removeprefix("--").split()
    assert counts(**overrides | {name: int(value)})["gradient_accumulation_steps"] >= 1
