"""Adapter pairs at the limits: zero, singular and uneven factors, ranks far above the task's."""

import math
from functools import partial

import pytest
import torch

from hf_muon.optimizer.lora import Pair
from hf_muon.optimizer.lora_tangent import balance_factor, rescale
from tests.reference import lora as reference
from tests.unit.optimizer.pairs import (
    EXACT,
    FP32,
    ITERATED,
    PRODUCT,
    TANGENT,
    UPDATES,
    error,
    factors,
    gradients_of,
    moved,
    product,
    spectral_norm,
)

# ---- where a factor is zero or singular


@UPDATES
@pytest.mark.parametrize("polar", [EXACT, ITERATED], ids=["exact", "iterated"])
@pytest.mark.parametrize("zero", ["a", "b"])
def test_a_zero_factor_moves_and_leaves_the_other_alone(update, polar, zero):
    weights, G = factors()
    weights = weights._replace(**{zero: torch.zeros_like(getattr(weights, zero))})
    (other,) = {"a", "b"} - {zero}
    old = getattr(weights, other)
    # Its gradient is zero; what momentum it has from before has no direction in the product.
    momenta = gradients_of(weights, G)._replace(**{other: torch.randn_like(old)})
    for gradients in (gradients_of(weights, G), momenta):
        change = update(weights, gradients, polar=polar, decay=0.1)
        assert getattr(change, zero).any()
        assert torch.equal(old + getattr(change, other), old)


@UPDATES
def test_a_dead_expert_does_not_touch_its_neighbors(update):
    weights, G = factors(lead=(3,))
    weights.b[1] = 0
    change = update(weights, gradients_of(weights, G), decay=0.1)
    assert not change.a[1].any()
    assert all(change.a[e].any() and change.b[e].any() for e in (0, 2))


SINGULAR = {
    "zero": lambda w: Pair(0 * w.a, 0 * w.b),
    "b zero": lambda w: Pair(w.a, 0 * w.b),
    "a of rank 2": lambda w: Pair(w.a[:, :2] @ torch.randn(2, w.a.shape[1]), w.b),
    "b of rank 1": lambda w: Pair(w.a, w.b[:, :1].expand_as(w.b)),
    "tiny": lambda w: Pair(w.a, 1e-20 * w.b),
    "huge": lambda w: Pair(1e15 * w.a, w.b),
}


@UPDATES
@pytest.mark.parametrize("polar", [EXACT, ITERATED], ids=["exact", "iterated"])
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("shape", [(40, 56, 6), (12, 56, 32), (12, 10, 32)])
def test_singular_factors_give_finite_steps_of_bounded_size(update, polar, kind, shape):
    weights, G = factors(*shape)
    weights = SINGULAR[kind](weights)
    for size in (1.0, 1e-12, 1e12, 0.0):
        change = update(weights, gradients_of(weights, size * G), polar=polar, decay=0.01)
        assert all(c.isfinite().all() for c in change)
        first_order = product(Pair(weights.a, change.b)) + product(Pair(change.a, weights.b))
        # η from each half, singular values of an iterated factor up to 1.2, and the decay.
        bound = 2 * 1.2 * 0.1 + 0.01 * spectral_norm(product(weights)) * 2
        assert spectral_norm(first_order) <= bound


def test_values_out_of_range_are_refused():
    weights, G = factors()
    gradients = gradients_of(weights, G)
    for update in (PRODUCT, TANGENT):
        with pytest.raises(ValueError, match=r"lora_damping is 0; at least 1e-08"):
            update(weights, gradients, damping=0.0)
        with pytest.raises(ValueError, match=r"lr·weight_decay is 1 "):
            update(weights, gradients, decay=1.0)
    with pytest.raises(ValueError, match="iterations=0; at least 1"):
        TANGENT(weights, gradients, iterations=0)


# ---- training


def fitted(update, step, r=64, c=2.0, steps=300):
    """Relative error after fitting a matrix of rank 4 under noisy gradients, and the worst one.

    From B = 0 as PEFT does, with Nesterov momentum, warmup over 3 % of the steps and a cosine; the
    target has spectral norm 1, so that ``step`` is the part of it that c·BA moves in one step.
    """
    m, n = 96, 80
    target = torch.randn(m, 4) @ torch.randn(4, n)
    target /= spectral_norm(target)
    noise = 0.5 * target.norm() / math.sqrt(m * n)
    weights = Pair(torch.randn(r, n) / math.sqrt(3 * n), torch.zeros(m, r))
    momenta = Pair(torch.zeros(r, n), torch.zeros(m, r))
    worst = 0.0
    for t in range(steps):
        G = c * weights.b @ weights.a - target + noise * torch.randn(m, n)
        gradients = gradients_of(weights, G, c)
        momenta = Pair(*(0.95 * M + 0.05 * g for M, g in zip(momenta, gradients, strict=True)))
        seen = Pair(*(0.95 * M + 0.05 * g for M, g in zip(momenta, gradients, strict=True)))
        rate = min(1, (t + 1) / (0.03 * steps)) * 0.5 * (1 + math.cos(math.pi * t / steps))
        change = update(weights, seen, step=step * rate / c)
        weights = Pair(*(w + d.float() for w, d in zip(weights, change, strict=True)))
        end = error(c * weights.b @ weights.a, target)
        worst = max(worst, end)
    return end, worst


def absolute(weights, gradients, step, damping):
    new = reference.product(*weights, *gradients, step=step, damping=damping, relative=False)
    return Pair(*(n - w for n, w in zip(new, weights, strict=True)))


@UPDATES
@pytest.mark.parametrize("step", [0.01, 0.03, 0.1])
def test_a_rank_far_above_the_targets_does_not_diverge(update, step):
    end, worst = fitted(partial(update, polar=ITERATED, damping=0.1), step)
    # The start has error 1. What is left at the end is noise that r = 64 takes for signal.
    assert end < 0.15
    assert worst < 1.05


@pytest.mark.parametrize("damping", [1e-1, 1e-2])
def test_relative_damping_stays_where_absolute_damping_diverges(damping):
    step = 0.3  # of the target, in one step: a rate at which the first steps may overshoot
    end, worst = fitted(partial(PRODUCT, polar=ITERATED, damping=damping), step)
    assert end < 0.15
    assert worst < 5
    end, _ = fitted(partial(absolute, damping=damping / 10), step)
    assert end > 50


# ---- balancing


def balanced(weights, momenta, factor):
    """Copies of both, rescaled as a step rescales them: f for A, 1/f for B."""
    weights, momenta = (Pair(*(t.clone() for t in pair)) for pair in (weights, momenta))
    for side, by in enumerate((factor[..., None, None], 1 / factor[..., None, None])):
        rescale(weights[side], [momenta[side]], by)
    return weights, momenta


def squares(weights):
    return (w.double().square().sum((-2, -1)) for w in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balancing_brings_the_norms_together_and_leaves_the_product_bitwise(dtype):
    (A, B), G = factors(lead=(4,))
    uneven = torch.tensor([1e-3, 0.7, 30.0, 1e4])[:, None, None]
    weights = Pair((A * uneven).to(dtype), (B / uneven).to(dtype))
    momenta = Pair(*(g.to(dtype) for g in gradients_of(Pair(*(w.float() for w in weights)), G)))
    f = balance_factor(*squares(weights))
    after, momenta_after = balanced(weights, momenta, f)
    assert all(t.dtype == dtype for t in (*after, *momenta_after))
    assert torch.equal(f, f.log2().round().exp2())
    assert torch.equal(after.b @ after.a, weights.b @ weights.a)
    square_a, square_b = squares(after)
    assert ((square_b / square_a).sqrt().log2().abs() <= 1).all()
    before_a, before_b = squares(weights)
    assert ((before_b / before_a).sqrt().log2().abs().amax()) > 10
    # Momenta are gradients: BᵀM and MAᵀ of the rescaled factors, to the rounding of their dtype.
    expected = gradients_of(Pair(*(w.float() for w in after)), G)
    for M, g in zip(momenta_after, expected, strict=True):
        assert error(M.float(), g) < 2 * torch.finfo(dtype).eps


@UPDATES
def test_balancing_does_not_change_the_course_of_the_product(update):
    weights, G = factors()
    weights = Pair(100 * weights.a, weights.b / 100)
    momenta = gradients_of(weights, G)
    after, momenta_after = balanced(weights, momenta, balance_factor(*squares(weights)))
    step = moved(weights, update(weights, momenta))
    assert error(moved(after, update(after, momenta_after)), step) < FP32
    if update is TANGENT:  # `product` forgets the size of each momentum
        assert error(moved(after, update(after, momenta)), step) > 0.01


def test_a_zero_factor_has_nothing_to_balance():
    f = balance_factor(torch.tensor([0.0, 1.0, 0.0, 16.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert f.tolist() == [1.0, 1.0, 1.0, 0.5]
