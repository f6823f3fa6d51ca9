"""A step on LoRA pairs is that of a plain loop; groups without whole pairs are refused."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from hf_muon import Muon
from hf_muon.distributed.layout import Matrix
from hf_muon.optimizer.lora import Pair, pair_step_size, product_update
from hf_muon.optimizer.lora_tangent import balance_factor, tangent_update
from hf_muon.optimizer.step import polar_function

UPDATES = pytest.mark.parametrize("update", ["product", "tangent"])
# name -> (m, n, r, c, number of experts); rank 1 and an expert stack with strided B among them.
ADAPTERS = {
    "q": (64, 64, 4, 2.0, 1),
    "up": (112, 64, 8, 0.5, 1),
    "down": (64, 112, 16, -2.0, 1),
    "thin": (24, 40, 1, 1.0, 1),
    "experts": (28, 20, 4, 2.0, 3),
}


def parameters(dtype=torch.float32):
    """A and B of each adapter by name, B = 0 in the first of them as PEFT starts."""
    named = {}
    for name, (m, n, r, _, experts) in ADAPTERS.items():
        A = torch.randn(experts * r, n) / math.sqrt(n)
        B = torch.randn(m, r * experts) / math.sqrt(m)
        named[f"{name}.A"] = nn.Parameter(A.to(dtype))
        named[f"{name}.B"] = nn.Parameter((0 * B if name == "q" else B).to(dtype))
    return named


def regions(name):
    """The matrices of A or B: those of an expert are rows of A, and every third column of B."""
    m, n, r, _, experts = ADAPTERS[name[:-2]]
    if name.endswith("A"):
        return tuple((e * r * n, (r, n), (n, 1), 0) for e in range(experts))
    return tuple((e, (m, r), (r * experts, experts), 0) for e in range(experts))


def expert(name, tensor, e):
    """What the region says, written as PEFT writes it."""
    m, n, r, _, experts = ADAPTERS[name[:-2]]
    if name.endswith("A"):
        return tensor.view(experts, r, n)[e]
    return tensor.view(m, r, experts)[..., e]


def group_of(named, **settings):
    other = {"A": "B", "B": "A"}
    return {
        "params": list(named.items()),
        "matrices": tuple(map(regions, named)),
        "pairs": tuple(name[:-1] + other[name[-1]] for name in named),
        "factors": tuple(name[-1] for name in named),
        "scalings": tuple(ADAPTERS[name[:-2]][3] for name in named),
        **settings,
    }


def optimizer_of(named, update, **settings):
    return Muon(
        [group_of(named)],
        **{"lr": 0.02, "weight_decay": 0.1, "lora_update": update, **settings},
    )


def gradients(named, step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in named.items()}


def by_loop(named, update, steps, balance_every=0, nesterov=True, momentum=0.95):
    """The same training, pair by pair and expert by expert, with nothing but the pure updates."""
    settings = {"polar_method": "auto", "coefficients": "polar_express", "polar_steps": 5}
    polar = polar_function({**settings, "polar_dtype": "float32", "compile": False})
    function = product_update if update == "product" else partial(tangent_update, iterations=3)
    weights = {name: p.detach().clone() for name, p in named.items()}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(steps):
        given = gradients(named, step)
        for name, (m, n, r, c, experts) in ADAPTERS.items():
            size = pair_step_size("match_rms_adamw", Matrix.whole((r, n)), Matrix.whole((m, r)), c)
            for e in range(experts):
                names = Pair(f"{name}.A", f"{name}.B")
                W, M, G = (
                    Pair(*(expert(one, of[one], e) for one in names))
                    for of in (weights, momenta, given)
                )
                for buffer, gradient in zip(M, G, strict=True):
                    buffer.lerp_(gradient, 1 - momentum)
                seen = M
                if nesterov:
                    seen = Pair(*(g.lerp(b, momentum) for g, b in zip(G, M, strict=True)))
                change = function(
                    Pair(*(w[None].contiguous() for w in W)),
                    Pair(*(g[None].contiguous() for g in seen)),
                    step=0.02 * size, decay=0.02 * 0.1, damping=1e-2, polar=polar,
                )  # fmt: skip
                for weight, moved in zip(W, change, strict=True):
                    weight.add_(moved[0])
                if balance_every and (step + 1) % balance_every == 0:
                    f = balance_factor(*(w.double().square().sum() for w in W))
                    for weight, buffer, by in zip(W, M, (f, 1 / f), strict=True):
                        weight.mul_(by)
                        buffer.div_(by)
    return weights


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
        torch.manual_seed(0)
        named = parameters()
        with torch.no_grad():
            for name, p in named.items():
                p.mul_(1e3 if name.endswith("A") else 1e-3)
        optimizer = optimizer_of(named, "tangent", tangent_balance_every=every)
        steps_of(named, optimizer, 2)
        runs[every] = named
    for name in ADAPTERS:
        a, b = f"{name}.A", f"{name}.B"
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
        torch.manual_seed(0)
        named = parameters()
        kept = {name: p.detach().clone() for name, p in named.items()}
        optimizer = optimizer_of(named, update)
        for name, gradient in gradients(named, 0).items():
            named[name].grad = gradient
        for name in ("up.A", "experts.B"):
            named[name].grad = None if missing else torch.zeros_like(named[name])
        for name in ("down.A", "down.B"):
            named[name].grad = None
        optimizer.step()
        runs.append(named)
        assert torch.equal(named["down.A"], kept["down.A"])
        assert int(optimizer.state[named["down.B"]]["step"]) == 0
        assert int(optimizer.state[named["up.A"]]["step"]) == 1
    for name, p in runs[0].items():
        assert torch.equal(p, runs[1][name]), name
    assert not torch.equal(runs[0]["up.A"], kept["up.A"])  # it decays, and its partner moves


@UPDATES
def test_weights_in_bfloat16_are_rounded_once(update):
    torch.manual_seed(0)
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
    torch.manual_seed(0)
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
    torch.manual_seed(0)
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
    return {**group_of({"up.A": torch.ones(8, 64), "up.B": torch.ones(112, 8)}), **changes}


WRONG = {
    "no names": (wrong(params=[torch.ones(8, 64), torch.ones(112, 8)]), "needs named parameters"),
    "no pairs": (wrong(pairs=()), "its partner in 'pairs'"),
    "no scalings": (wrong(scalings=(2.0,)), "scaling in 'scalings'"),
    "absent partner": (
        wrong(pairs=("up.B", "p.A")),
        r"up\.A has .* no partner .* 'up\.B' is given",
    ),
    "unpaired": (wrong(pairs=("up.B", "")), r"no partner in its group .* lora_update='factor'"),
    "two A": (wrong(factors=("A", "A")), r"up\.A has lora_update='product' and no partner"),
    "exchanged": (wrong(factors=("B", "A")), r"up\.B and up\.A do not fit"),
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
