"""Step counts lie where they are read without waiting, wherever state comes from."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_muon import Muon
from hf_muon.optimizer import adamw, import_state
from hf_muon.optimizer.launcher import complete_state
from tests.elsewhere import DEVICE, There, elsewhere


def build(warmup=False):
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(4, 6, device=DEVICE)) for name in "qkv"}
    bias = nn.Parameter(torch.randn(6, device=DEVICE))
    groups = [
        {"params": list(weights.items())},
        {"params": [("bias", bias)], "algorithm": "adamw"},
    ]
    schedule = {"momentum_start": 0.5, "momentum_warmup_steps": 9} if warmup else {}
    return Muon(groups, lr=0.1, polar_dtype="float32", **schedule)


def train(optimizer, steps=1):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def counts_of(optimizer, algorithm="muon"):
    groups = [g for g in optimizer.param_groups if g["algorithm"] == algorithm]
    return [optimizer.state[p]["step"] for g in groups for p in g["params"]]


def moved(state, device=DEVICE):
    """A state with all its tensors on a device."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def mapped(saved):
    return {**saved, "state": {index: moved(state) for index, state in saved["state"].items()}}


def by_load_state_dict(source, optimizer):
    optimizer.load_state_dict(mapped(copy.deepcopy(source.state_dict())))


def by_torch_distributed_checkpoint(source, optimizer):
    models = []
    for one in (source, optimizer):
        model = nn.Module()
        for group in one.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                model.register_parameter(name, p)
        models.append(model)
    saved = get_optimizer_state_dict(models[0], source)
    set_optimizer_state_dict(models[1], optimizer, mapped(saved))


def by_a_loader_that_writes_into_the_state(source, optimizer):
    train(optimizer)
    for p, q in zip(all_of(source), all_of(optimizer), strict=True):
        optimizer.state[q] = moved(source.state[p])
    optimizer.__setstate__(optimizer.__getstate__())


def by_what_moves_all_state_between_steps(source, optimizer):
    train(optimizer, 3)
    for p in all_of(optimizer):
        optimizer.state[p] = moved(moved(optimizer.state[p], "cpu"))


def by_import(source, optimizer):
    names = [name for group in source.param_groups for name in group["param_names"]]
    state = {n: {"momentum_buffer": torch.ones(4, 6, device=DEVICE)} for n in range(3)}
    groups = [{"params": [0, 1, 2]}]
    with pytest.warns(UserWarning, match="no state for 1 of 4 trained parameters: bias"):
        import_state(optimizer, {"state": state, "param_groups": groups}, names[:3])


def all_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


LOADERS = [
    by_load_state_dict,
    by_torch_distributed_checkpoint,
    by_a_loader_that_writes_into_the_state,
    by_what_moves_all_state_between_steps,
    by_import,
]


@pytest.mark.parametrize("load", LOADERS)
def test_counts_are_on_the_cpu_after_a_load_and_one_step(load):
    with elsewhere() as crossed:
        source, optimizer = build(warmup=True), build(warmup=True)
        train(source, 3)
        load(source, optimizer)
        train(optimizer)
        counts = counts_of(optimizer)
        assert all(count.is_cpu and count.dtype == torch.float32 for count in counts)
        assert {int(count) for count in counts} == {1 if load is by_import else 4}

        def waits():
            crossed.clear()
            train(optimizer)
            return sum(one.way == "waits" for one in crossed)

        few = waits()
        for p in all_of(optimizer)[:3]:
            optimizer.state[p]["step"] = optimizer.state[p]["step"].to(DEVICE)
        # A warm-up of momentum reads the count of each matrix: from the device, once more each.
        assert waits() == few + 3
        assert waits() == few


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_deepspeed_s_universal_loader_may_share_one_count_on_the_device(algorithm):
    with elsewhere():
        optimizer = build()
        [group, *_] = [g for g in optimizer.param_groups if g["algorithm"] == algorithm]
        count, flat = torch.ones((), device=DEVICE), torch.zeros(24, device=DEVICE)
        state = {"step": count, "exp_avg": flat.clone(), "exp_avg_sq": flat.clone()}
        complete_state(group, state, flat)
        assert state["step"] is not count
        assert int(state["step"]) == 1
        assert state["step"].is_cpu == (algorithm == "muon")


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_counts_where_its_kernels_do(fused, monkeypatch):
    monkeypatch.setattr(
        adamw, "_get_fused_kernels_supported_devices", lambda: ["meta"] if fused else []
    )
    with elsewhere() as crossed:
        optimizer = build()
        train(optimizer, 2)
        [before] = counts_of(optimizer, "adamw")
        assert isinstance(before, There) == fused
        for p in all_of(optimizer):
            optimizer.state[p] = moved(optimizer.state[p])
        train(optimizer)
        crossed.clear()
        train(optimizer)
        [count] = counts_of(optimizer, "adamw")
        assert isinstance(count, There) == fused
        assert int(count) == 4
        # It is not moved there in each step.
        assert not [one for one in crossed if one.numel == 1 and one.way == "there"]
