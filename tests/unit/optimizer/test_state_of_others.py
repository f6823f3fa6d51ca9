"""State, settings and hooks of users, launchers and schedulers: used, kept, or refused in time."""

import copy
import enum
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR

from hf_muon import Muon
from tests.unit.optimizer.test_checkpoint import build, model, through_a_file, train
from tests.unit.optimizer.test_loading import NAN, same, trained

# --- a step is all or nothing --------------------------------------------------------------------


def converted(net, optimizer):
    net.to(torch.bfloat16)


def deleted(net, optimizer):
    del optimizer.state[net[2].bias]["exp_avg_sq"]


def without_step(net, optimizer):
    del optimizer.state[net[2].weight]["step"]


def resized(net, optimizer):
    net[2].bias.data = torch.zeros(7)


def poisoned(net, optimizer):
    optimizer.state[net[2].weight]["exp_avg"][0, 0] = NAN
    optimizer.__setstate__(optimizer.__getstate__())  # as loaders do that write into the state


AFTERWARDS = [
    (converted, r"0\.weight has dtype torch.float32 and torch.bfloat16 is .*load_state_dict"),
    (deleted, r"2\.bias holds only \['exp_avg', 'step'\]"),
    (without_step, r"2\.weight holds only \['exp_avg'\]"),
    (resized, r"2\.bias has shape \(6,\) and \(7,\) is expected"),
    (poisoned, r"2\.weight holds NaN"),
]


@pytest.mark.parametrize(("change", "message"), AFTERWARDS)
def test_state_that_no_longer_fits_stops_a_step_before_it_moves(change, message):
    net, optimizer = trained()
    change(net, optimizer)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert same(before, net.state_dict())


def test_a_converted_model_goes_on_with_converted_state():
    net, optimizer = trained()
    net.to(torch.float64)
    optimizer.load_state_dict(optimizer.state_dict())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float64}


def test_a_python_step_count_that_a_loader_wrote_is_taken():
    optimizer = trained()[1]
    for state in optimizer.state.values():
        state["step"] = 1.0
    again = copy.deepcopy(optimizer)
    for p in again.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    again.step()
    assert {int(s["step"]) for s in list(again.state.values())[:3]} == {2}


# --- plain values --------------------------------------------------------------------------------


class Order(enum.StrEnum):
    PRE = "pre_polar"


ODD = {
    "order": np.str_("pre_polar"),
    "momentum": np.float64(0.9),
    "polar_steps": np.int64(4),
    "nesterov": np.bool_(True),
    "lr": torch.tensor(0.1),
}


@pytest.mark.parametrize("odd", [ODD, {"order": Order.PRE, "lr": np.float32(0.1)}])
@pytest.mark.parametrize("place", ["settings", "group", "added"])
def test_values_are_plain_wherever_they_come_from(odd, place):
    def build_one():
        w, b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        matrix = {"params": [(np.str_("w"), w)]}
        vector = {
            "params": [("b", b)],
            "algorithm": np.str_("adamw"),
            "lr": torch.tensor(0.1),
            "betas": (np.float64(0.9), torch.tensor(0.95)),
            "eps": np.float64(1e-6),
            "lr_scale": np.float32(0.5),
        }
        if place == "settings":
            return Muon([matrix, vector], **{"lr": 0.1, **odd})
        if place == "group":
            return Muon([{**matrix, **odd}, vector], lr=0.1)
        optimizer = Muon([("first", nn.Parameter(torch.randn(4, 4)))], lr=0.1)
        optimizer.add_param_group({**matrix, **odd})
        return optimizer

    saved = through_a_file(build_one().state_dict())  # fails for what is not plain
    build_one().load_state_dict(saved)
    plain = {float, int, bool, str, tuple, list}
    assert all(type(v) in plain for g in saved["param_groups"] for v in g.values())


def test_rates_that_a_schedule_wrote_are_saved_as_plain_numbers():
    optimizer = build(model())
    LambdaLR(optimizer, lambda step: np.float64(0.5))
    assert type(optimizer.param_groups[0]["lr"]) is not float  # what torch's own would save
    saved = through_a_file(optimizer.state_dict())
    assert type(saved["param_groups"][0]["lr"]) is float


# --- hooks, foreign state, schedulers, torch.distributed.checkpoint ------------------------------


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_run_in_the_documented_order(prepend):
    optimizer = trained()[1]
    saved = copy.deepcopy(optimizer.state_dict())
    theirs = {"wrapped": saved}
    order = []

    def unwrap(_, given):
        order.append("pre")
        return given["wrapped"]

    def look(loaded):
        order.append("post")
        assert all(s["step"].shape == () for s in loaded.state.values())
        assert loaded._settings[0]["lr"] == 0.02
        loaded.param_groups[0]["lr"] = 0.5

    optimizer.register_load_state_dict_pre_hook(unwrap, prepend=prepend)
    optimizer.register_load_state_dict_post_hook(look, prepend=prepend)
    optimizer.load_state_dict(theirs)
    assert order == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(KeyError):
        optimizer.load_state_dict({})
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1  # ours is gone
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


def test_a_hook_may_convert_momentum_before_it_is_checked():
    net, optimizer = trained(momentum_dtype="float64")
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg"].flatten()

    def reshape(opt, given):
        params = [p for group in opt.param_groups for p in group["params"]]
        state = {
            i: {**s, "exp_avg": 2 * s["exp_avg"].view(params[i].shape)}
            for i, s in given["state"].items()
        }
        return {**given, "state": state}

    before = optimizer.state[net[0].weight]["exp_avg"].clone()
    optimizer.register_load_state_dict_pre_hook(reshape)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[net[0].weight]["exp_avg"], 2 * before)


def test_foreign_state_survives():
    net, optimizer = trained()
    optimizer.state["x"] = 1
    optimizer.state[net[0].weight]["note"] = torch.ones(2)
    saved = through_a_file(optimizer.state_dict())
    again = build(net)
    again.param_groups[0]["note"] = object()
    again.load_state_dict(saved)
    assert again.state["x"] == 1
    assert torch.equal(again.state[net[0].weight]["note"], torch.ones(2))
    train(net, again, 1, seed=2)


@pytest.mark.parametrize("kind", ["one cycle", "cyclic"])
def test_schedulers_that_cycle_momentum_move_both_halves(kind):
    net = model()
    optimizer = build(net)
    if kind == "one cycle":
        schedule = OneCycleLR(optimizer, 0.1, total_steps=8)
    else:
        schedule = CyclicLR(optimizer, 0.01, 0.1, step_size_up=4, max_momentum=0.95)
    seen = set()
    for _ in range(6):
        train(net, optimizer, 1, seed=1)
        matrices, vectors = optimizer.param_groups
        assert matrices["momentum"] == vectors["momentum"]
        seen.add(matrices["momentum"])
        schedule.step()
    assert len(seen) > 3


def test_a_cycled_momentum_is_the_first_beta_of_adamw():
    seen_in_adamw = []
    vector = nn.Parameter(torch.zeros(3))
    for momentum in (0.85, 0.95):  # the β₁ that trains is the cycled one
        vectors = {"params": [vector], "algorithm": "adamw", "momentum": momentum}
        one = Muon([{"params": [nn.Parameter(torch.eye(2))]}, vectors], lr=0.1)
        vector.grad = torch.ones(3)
        one.step()
        seen_in_adamw.append(one.state[vector]["exp_avg"][0].item())
    assert seen_in_adamw == pytest.approx([0.15, 0.05])
    assert "momentum" not in build(model()).param_groups[1]  # β₁ stays in betas otherwise


def test_a_tensor_learning_rate_follows_a_schedule_as_in_torch():
    rates = []
    for kind in (Muon, torch.optim.AdamW):
        optimizer = kind([nn.Parameter(torch.eye(3))], lr=torch.tensor(0.1))
        schedule = CosineAnnealingLR(optimizer, 5)
        seen = []
        for _ in range(4):
            optimizer.step()
            schedule.step()
            seen.append(float(optimizer.param_groups[0]["lr"]))
        rates.append(seen)
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)  # torch's is kept in float32


# torch 2.13 cannot load what is both, whatever the optimizer.
@pytest.mark.parametrize(("full", "flatten"), [(False, False), (False, True), (True, False)])
def test_distributed_checkpoint_loads_without_a_warning(full, flatten):
    options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flatten)
    net = model()
    net[1].requires_grad_(False)
    optimizer = build(net)
    train(net, optimizer, 2, seed=1)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    other = copy.deepcopy(net)
    resumed = build(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        set_optimizer_state_dict(other, resumed, saved, options=options)
    train(net, optimizer, 1, seed=2)
    train(other, resumed, 1, seed=2)
    assert same(net.state_dict(), other.state_dict())
