"""A step on LoRA pairs is that of a plain loop; groups without whole pairs are refused."""

import copy

import pytest
import torch
from torch import nn

from hf_muon import Muon
from tests.reference.pairs import ADAPTERS, by_loop, expert, gradients, group_of, parameters

UPDATES = pytest.mark.parametrize("update", ["product", "tangent"])


def optimizer_of(named, update, **settings):
    return Muon(
        [group_of(named)],
        **{"lr": 0.02, "weight_decay": 0.1, "lora_update": update, **settings},
    )


@UPDATES
@pytest.mark.parametrize("earlier", [0, 2], ids=["at once", "later"])
def test_a_pair_of_which_one_factor_is_frozen_later_stops_the_step(update, earlier):
    named = parameters()
    optimizer = optimizer_of(named, update)
    steps_of(named, optimizer, earlier)
    before = {name: p.detach().clone() for name, p in named.items()}
    for one, gradient in gradients(named, 5).items():
        named[one].grad = gradient
    named["up_A"].requires_grad_(False).grad = None
    with pytest.raises(ValueError, match="up_A was frozen after the optimizer was made"):
        optimizer.step()
    assert all(torch.equal(p, before[one]) for one, p in named.items())
    named["up_B"].requires_grad_(False).grad = None
    optimizer.step()  # with both frozen the others move
    for name in ("up_A", "up_B", "down_A", "down_B"):
        assert torch.equal(named[name], before[name]) == name.startswith("up")


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("update", "every"), [("product", 0), ("tangent", 0), ("tangent", 2)])
def test_ten_steps_equal_a_loop_over_the_pure_update_bitwise(update, every, nesterov):
    named = parameters()
    expected = by_loop(named, update, 10, every, nesterov)
    control = by_loop(named, update, 10, every, not nesterov)
    optimizer = optimizer_of(
        named, update, nesterov=nesterov, tangent_balance_every=every, polar_dtype="float32"
    )
    for step in range(10):
        for name, gradient in gradients(named, step).items():
            named[name].grad = gradient
        optimizer.step()
    for name, p in named.items():
        assert torch.equal(p, expected[name]), name
        assert not torch.equal(p, control[name]), name


def steps_of(named, optimizer, count=3, skip=()):
    for step in range(count):
        for name, gradient in gradients(named, step).items():
            named[name].grad = None if name in skip else gradient.to(named[name].dtype)
        optimizer.step()


def test_balancing_keeps_products_and_acts_only_when_it_is_due():
    runs = {}
    for every in (0, 2, 3):
        named = parameters(uneven=1e3)
        optimizer = optimizer_of(named, "tangent", tangent_balance_every=every)
        steps_of(named, optimizer, 2)
        runs[every] = named
    for name in ADAPTERS:
        a, b = f"{name}_A", f"{name}_B"
        for e in range(ADAPTERS[name][4]):
            A, B = (expert(x, runs[2][x].detach(), e) for x in (a, b))
            assert 0.5 <= (A.double().norm() / B.double().norm()).item() <= 2
            other = [expert(x, runs[0][x].detach(), e) for x in (a, b)]
            assert torch.equal(B @ A, other[1] @ other[0])
            assert (other[0].norm() / other[1].norm()).item() > 100
        assert torch.equal(runs[0][a], runs[3][a])


@UPDATES
def test_a_factor_without_gradient_counts_as_zero_where_its_partner_has_one(update):
    runs = []
    for missing in (True, False):
        named = parameters()
        kept = {name: p.detach().clone() for name, p in named.items()}
        optimizer = optimizer_of(named, update)
        for name, gradient in gradients(named, 0).items():
            named[name].grad = gradient
        for name in ("up_A", "experts_B"):
            named[name].grad = None if missing else torch.zeros_like(named[name])
        for name in ("down_A", "down_B"):
            named[name].grad = None
        optimizer.step()
        runs.append(named)
        assert torch.equal(named["down_A"], kept["down_A"])
        assert int(optimizer.state[named["down_B"]]["step"]) == 0
        assert int(optimizer.state[named["up_A"]]["step"]) == 1
    for name, p in runs[0].items():
        assert torch.equal(p, runs[1][name]), name
    assert not torch.equal(runs[0]["up_A"], kept["up_A"])  # it decays, and its partner moves


@UPDATES
def test_weights_in_bfloat16_are_rounded_once(update):
    low = parameters(torch.bfloat16)
    wide = {name: nn.Parameter(p.detach().float()) for name, p in low.items()}
    runs = [optimizer_of(n, update, momentum_dtype="float32") for n in (low, wide)]
    for name, gradient in gradients(low, 0).items():
        low[name].grad = gradient.bfloat16()
        wide[name].grad = gradient.bfloat16().float()
    for optimizer in runs:
        optimizer.step()
    assert all(torch.equal(low[name], wide[name].bfloat16()) for name in low)


@UPDATES
def test_float64_weights_stay_float64_and_agree_with_float32(update):
    single = parameters()
    double = {name: nn.Parameter(p.detach().double()) for name, p in single.items()}
    for named, dtype in ((single, "float32"), (double, "float64")):
        optimizer = optimizer_of(
            named, update, polar_dtype=dtype, momentum_dtype="float32", polar_method="svd"
        )
        steps_of(named, optimizer, 1)
    for name, p in single.items():
        # B = 0 at the start, or rank 1: singular, where float32 sees rounding.
        assert torch.allclose(p.double(), double[name], rtol=0, atol=1e-5), name
    assert all(p.dtype == torch.float64 for p in double.values())


@UPDATES
def test_zero_gradients_with_lr_zero_change_nothing(update):
    # What torch.distributed.checkpoint does to make the state of an optimizer before loading.
    named = parameters()
    kept = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer_of(named, update, lr=0.0).step()
    assert all(torch.equal(p, kept[name]) for name, p in named.items())


@UPDATES
def test_inputs_of_a_step_are_not_written(update):
    named = parameters()
    given = gradients(named, 0)
    for name, p in named.items():
        p.grad = given[name]
    optimizer_of(named, update).step()
    assert all(torch.equal(g, gradients(named, 0)[name]) for name, g in given.items())


def test_a_factor_group_and_a_pair_group_train_side_by_side():
    named, matrix = parameters(), nn.Parameter(torch.randn(32, 32))
    alone = nn.Parameter(matrix.detach().clone())
    matrix.grad = torch.randn(32, 32)
    alone.grad = matrix.grad.clone()
    optimizer = Muon(
        [{"params": [("w", matrix)], "lora_update": "factor"}, group_of(named)],
        lr=0.02, lora_update="product",
    )  # fmt: skip
    steps_of(named, optimizer, 1)
    Muon([alone], lr=0.02).step()
    assert torch.equal(matrix, alone)


def wrong(**changes):
    """A group of one pair, with something else in it."""
    return {**group_of({"up_A": torch.ones(8, 64), "up_B": torch.ones(112, 8)}), **changes}


WRONG = {
    "no names": (wrong(params=[torch.ones(8, 64), torch.ones(112, 8)]), "needs named parameters"),
    "no pairs": (wrong(pairs=()), "its partner in 'pairs'"),
    "no scalings": (wrong(scalings=(2.0,)), "scaling in 'scalings'"),
    "absent partner": (
        wrong(pairs=("up_B", "p_A")),
        r"up_A has .* no partner .* 'up_B' is given",
    ),
    "unpaired": (wrong(pairs=("up_B", "")), r"no partner in its group .* lora_update='factor'"),
    "two A": (wrong(factors=("A", "A")), r"up_A has lora_update='product' and no partner"),
    "exchanged": (wrong(factors=("B", "A")), r"up_B and up_A do not fit"),
    "other scaling": (wrong(scalings=(2.0, 1.0)), "other factor of the same adapter"),
    "scaling 0": (wrong(scalings=(0.0, 0.0)), "scaling 0"),
    "unknown side": (
        wrong(
            adjust_lr="spectral",
            matrices=(((0, (8, 64), (64, 1), None),), ((0, (112, 8), (8, 1), None),)),
        ),
        "fan_out",
    ),
    "damping": (wrong(lora_damping=0.0), "lora_damping=0.0 is out of range"),
    "order": (wrong(order="post_polar"), "needs order='pre_polar'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_groups_without_whole_pairs_are_refused_at_construction(case):
    group, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Muon([group], lr=0.1, lora_update="product")


def test_matrices_that_are_no_factors_are_refused_at_construction():
    with pytest.raises(ValueError, match="needs named parameters"):
        Muon([torch.randn(8, 12)], lr=0.1, lora_update="tangent")


def test_a_decay_that_takes_the_product_away_is_refused_before_anything_is_written():
    named = parameters()
    optimizer = optimizer_of(named, "product")
    steps_of(named, optimizer, 1)
    before = copy.deepcopy([optimizer.state[p] for p in named.values()])
    optimizer.param_groups[0]["weight_decay"] = 50.0
    with pytest.raises(ValueError, match=r"lr·weight_decay is 1 .* Lower the weight decay"):
        optimizer.step()
    for p, state in zip(named.values(), before, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], state["exp_avg"])
