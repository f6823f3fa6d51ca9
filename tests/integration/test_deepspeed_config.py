"""Settings of DeepSpeed that would replace Muon, or break it, are refused with the remedy."""

import json
import os

import pytest
import torch.distributed as dist

import hf_muon
from hf_muon.integrations.deepspeed import check_config
from tests.integration.tiny import trainer_of

FINE = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
REFUSED = {
    "optimizer": ({"optimizer": {"type": "AdamW"}}, "Remove the section"),
    "zero_force_ds_cpu_optimizer": ({"zero_optimization": OFFLOAD}, "Set it to false"),
    "device = nvme": (
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}},
            "zero_force_ds_cpu_optimizer": False,
        },
        "device 'cpu'",
    ),
    "offload_param": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        "device 'cpu'",
    ),
    "ratio": (
        {
            "zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "zero_force_ds_cpu_optimizer": False,
        },
        "Remove it",
    ),
    "super_offload": (
        {
            "zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}},
            "zero_force_ds_cpu_optimizer": False,
        },
        "Remove it",
    ),
    "round_robin_gradients": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "Remove it",
    ),
    "zenflow": ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "Remove"),
    "zero_hpz_partition_size": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        "Remove it",
    ),
    "mics_shard_size": ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "Remove it"),
    "autotp_size": ({"tensor_parallel": {"autotp_size": 2}}, "Use FSDP2"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_is_refused(setting):
    config, remedy = REFUSED[setting]
    with pytest.raises(ValueError, match=remedy) as caught:
        check_config(config)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2  # the message and the one setting that is wrong
    assert setting.removeprefix("offload_param") in lines[1]


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(ValueError, match="optimizer: ") as caught:
        check_config({"optimizer": {}, **REFUSED["optimizer"][0], **REFUSED["zenflow"][0]})
    assert "zenflow" in str(caught.value)


def test_ordinary_settings_pass():
    check_config(FINE)
    check_config({"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False})


@pytest.mark.parametrize("adamw_lr", [None, 1e-2, 1e-3])
@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "OneCycle", "WarmupCosineLR"])
def test_schedules_that_write_rates_need_one_rate_for_both_halves(kind, adamw_lr):
    run = hf_muon.MuonConfig(lr=1e-2, adamw_lr=adamw_lr)
    config = {**FINE, "scheduler": {"type": kind, "params": {}}}
    if kind == "WarmupCosineLR" or adamw_lr != 1e-3:  # it scales the rates; there is one
        check_config(config, run)
    else:
        with pytest.raises(ValueError, match=rf"scheduler: {kind} .*adamw_lr=0\.001 .*Remove"):
            check_config(config, run)


OPTIMIZER = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 2},
}


def trainer_under(config, tmp_path, **settings):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", **config}))
    return trainer_of(tmp_path, deepspeed=str(path), **settings)


@pytest.mark.parametrize("config", [OPTIMIZER, {"zero_optimization": OFFLOAD}])
def test_a_trainer_that_would_train_with_another_optimizer_is_not_built(config, tmp_path, alone):
    hf_muon.register()
    with pytest.raises(ValueError, match="does not let Muon train"):
        trainer_under(config, tmp_path)


def test_a_schedule_that_would_lose_a_rate_stops_the_trainer(tmp_path, alone):
    hf_muon.register()
    warmup = {"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR", "params": {}}}
    with pytest.raises(ValueError, match="scheduler: WarmupLR"):
        trainer_under(warmup, tmp_path, optim_args="adamw_lr=1e-3")


def test_the_factory_refuses_as_well(tmp_path, alone):
    trainer = trainer_under({"zero_optimization": OFFLOAD}, tmp_path, optim="adamw_torch")
    with pytest.raises(ValueError, match="zero_force_ds_cpu_optimizer"):
        hf_muon.MuonOptimizerFactory()(trainer.model, lr=1e-3)


def test_other_optimizers_are_left_alone(tmp_path, alone):
    hf_muon.register()
    assert trainer_under(OPTIMIZER, tmp_path, optim="adamw_torch").args.deepspeed


@pytest.fixture
def alone():
    """One process with DeepSpeed, which leaves no trace in the next test."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    os.environ.update(
        {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1",
    )  # fmt: skip
    yield
    os.environ.clear()  # TrainingArguments and accelerate write into it
    os.environ.update(before)
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    if dist.is_initialized():
        dist.destroy_process_group()
