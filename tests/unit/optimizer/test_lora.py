"""Updates of adapter pairs against float64 oracles, and what they promise about the product BA."""

import math
from functools import partial

import pytest
import torch

from hf_muon.distributed.layout import Matrix
from hf_muon.optimizer.lora import Pair, pair_step_size, product_update
from hf_muon.optimizer.lora_tangent import tangent_update
from tests.reference import lora as reference
from tests.unit.optimizer.pairs import (
    EXACT,
    FP32,
    ITERATED,
    PRODUCT,
    UPDATES,
    added,
    change_error,
    error,
    factors,
    gradients_of,
    moved,
    product,
    spectral_norm,
)

# ---- the formulas

SHAPES = pytest.mark.parametrize("shape", [(40, 56, 6), (56, 40, 6), (32, 32, 8), (20, 24, 32)])


@SHAPES
def test_product_equals_the_float64_oracle(shape):
    weights, G = factors(*shape)
    settings = {"step": 0.1, "decay": 0.02, "damping": 5e-2}
    change = product_update(weights, gradients_of(weights, G, c=2.0), polar=EXACT, **settings)
    # In float64, where the rank of the gradients (r > m) is not hidden by rounding.
    gradients = gradients_of(Pair(*(w.double() for w in weights)), G.double(), c=2.0)
    expected = reference.product(*weights, *gradients, **settings)
    assert change_error(weights, change, expected) < FP32
    for other in ({"damping": 6e-2}, {"relative": False}, {"decay": 0.03}):
        control = reference.product(*weights, *gradients, **{**settings, **other})
        assert change_error(weights, change, control) > 10 * FP32


@SHAPES
@pytest.mark.parametrize("iterations", [1, 3])
def test_tangent_equals_the_oracle_on_whole_matrices(shape, iterations):
    weights, G = factors(*shape)
    settings = {"step": 0.1, "decay": 0.02, "damping": 5e-2, "iterations": iterations}
    change = tangent_update(weights, gradients_of(weights, G, c=2.0), polar=EXACT, **settings)
    expected = reference.tangent(*weights, G, **settings)
    assert change_error(weights, change, expected) < FP32
    for other in ({"damping": 6e-2}, {"iterations": 4 - iterations}, {"decay": 0.03}):
        control = reference.tangent(*weights, G, **{**settings, **other})
        assert change_error(weights, change, control) > 10 * FP32


@UPDATES
def test_a_batch_of_pairs_is_each_pair_alone(update):
    weights, G = factors(lead=(3,))
    gradients = gradients_of(weights, G)
    batch = update(weights, gradients, decay=0.01)
    for e in range(3):
        alone = update(Pair(*(w[e] for w in weights)), Pair(*(g[e] for g in gradients)), decay=0.01)
        for together, one in zip(batch, alone, strict=True):
            # Batched kernels add in another order.
            torch.testing.assert_close(together[e], one, rtol=FP32, atol=FP32 * one.abs().max())


@UPDATES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_only_that_of_the_input(update, dtype):
    weights, G = factors()
    low = Pair(*(w.to(dtype) for w in weights))
    gradients = Pair(*(g.to(dtype) for g in gradients_of(weights, G)))
    change = update(low, gradients)
    wide = update(Pair(*(w.float() for w in low)), Pair(*(g.float() for g in gradients)))
    assert all(c.dtype == torch.float32 for c in change)
    assert all(torch.equal(c, w) for c, w in zip(change, wide, strict=True))


@UPDATES
def test_float64_stays_float64(update):
    weights, G = factors()
    double = Pair(*(w.double() for w in weights))
    gradients = gradients_of(double, G.double())
    exact = update(double, gradients, polar=partial(EXACT, dtype="float64"))
    assert all(c.dtype == torch.float64 for c in exact)
    if update is PRODUCT:
        expected = reference.product(*double, *gradients, step=0.1, damping=1e-3)
    else:
        expected = reference.tangent(*double, G, step=0.1, damping=1e-3)
    # Rounding of float64, times the condition number of a damped Gram matrix.
    assert change_error(double, exact, expected) < 1e-12


@UPDATES
def test_autocast_changes_nothing(update):
    weights, G = factors()
    gradients = gradients_of(weights, G)
    outside = update(weights, gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (weights.b @ weights.a).dtype == torch.bfloat16
        inside = update(weights, gradients)
    assert all(torch.equal(o, i) for o, i in zip(outside, inside, strict=True))


@UPDATES
def test_inputs_are_not_modified(update):
    weights, G = factors()
    gradients = gradients_of(weights, G)
    copies = [t.clone() for t in (*weights, *gradients)]
    update(weights, gradients, decay=0.1)
    assert all(torch.equal(t, c) for t, c in zip((*weights, *gradients), copies, strict=True))


# ---- what BA does


def by_factor(weights, gradients, step=0.1):
    """Muon on each factor alone: the control."""
    return Pair(*(-step * EXACT(gradient) for gradient in gradients))


@UPDATES
@pytest.mark.parametrize("polar", [EXACT, ITERATED], ids=["exact", "iterated"])
@pytest.mark.parametrize("k", [0.03, 7.3, 300.0])
def test_rescaled_factors_move_the_product_the_same_way(update, polar, k):
    weights, G = factors()
    rescaled = Pair(k * weights.a, weights.b / k)
    settings = {"polar": polar, "decay": 0.01}
    one = moved(weights, update(weights, gradients_of(weights, G), **settings))
    other = moved(rescaled, update(rescaled, gradients_of(rescaled, G), **settings))
    # A step of the iteration multiplies small singular values, and rounding errors, by up to 8.
    assert error(other, one) < (FP32 if polar is EXACT else 10 * FP32)
    control = moved(weights, by_factor(weights, gradients_of(weights, G)))
    assert error(moved(rescaled, by_factor(rescaled, gradients_of(rescaled, G))), control) > 0.1


def test_absolute_damping_would_not_survive_rescaling():
    weights, G = factors()
    rescaled = Pair(30 * weights.a, weights.b / 30)

    def stepped(pair, relative):
        new = reference.product(
            *pair, *gradients_of(pair, G), step=0.1, damping=1e-2, relative=relative
        )
        return product(Pair(*new)) - product(pair)

    assert error(stepped(rescaled, True), stepped(weights, True)) < FP32
    assert error(stepped(rescaled, False), stepped(weights, False)) > 0.1


def test_each_piece_of_a_product_step_has_half_the_spectral_norm():
    weights, G = factors()
    step = 0.3
    change = product_update(
        weights, gradients_of(weights, G, c=5.0), step=step, decay=0.0, damping=1e-8, polar=EXACT
    )
    for piece in (weights.b @ change.a, change.b @ weights.a):
        values = torch.linalg.svdvals(piece)
        # All r values are equal: a spectral step. The rest is zero.
        torch.testing.assert_close(values[:6], torch.full((6,), step / 2), rtol=FP32, atol=0)
        assert values[6:].max() < step * FP32
    factor = by_factor(weights, gradients_of(weights, G), step)
    assert abs(spectral_norm(weights.b @ factor.a) - step / 2) > 0.01


def test_a_tangent_step_is_the_projected_polar_factor():
    weights, G = factors()
    change = tangent_update(
        weights, gradients_of(weights, G), step=0.3, decay=0.0, damping=1e-8, polar=EXACT,
        iterations=3,
    )  # fmt: skip
    first_order = product(Pair(weights.a, change.b)) + product(Pair(change.a, weights.b))
    X, _ = reference.tangent_step(*weights, G, iterations=3)
    assert error(first_order, -0.3 * X) < FP32
    norms = [
        spectral_norm(reference.tangent_step(*weights, G, iterations=k)[0]) for k in (1, 3, 30)
    ]
    assert norms == sorted(norms, reverse=True)
    assert abs(norms[-1] - 1) < 0.02  # the iteration settles where projecting changes little


@UPDATES
def test_the_step_descends_for_either_sign_of_the_scaling(update):
    weights, G = factors()
    for c in (2.0, -2.0):
        change = update(weights, gradients_of(weights, G, c), step=1e-3)
        assert (c * moved(weights, change) * G).sum() < 0


@UPDATES
def test_the_product_decays_once_and_apart_from_the_step(update):
    weights, G = factors()
    gradients = gradients_of(weights, G)

    def second_order(size):
        step = update(weights, gradients, step=size)
        first = product(Pair(weights.a, step.b)) + product(Pair(step.a, weights.b))
        change = moved(weights, update(weights, gradients, step=size, decay=size))
        once = (change - (first - size * product(weights))).norm()
        twice = (change - (first - 2 * size * product(weights))).norm()
        return once, twice

    (large, wrong_large), (small, wrong_small) = second_order(1e-2), second_order(1e-3)
    # A tenth of the size leaves a hundredth of a second-order term, a tenth of a first-order one.
    assert large / small > 70
    assert wrong_large / wrong_small < 20


@UPDATES
def test_zero_gradients_change_nothing_but_decay(update):
    weights, G = factors()
    still = update(weights, gradients_of(weights, torch.zeros_like(G)))
    assert not any(c.any() for c in still)
    decayed = update(weights, gradients_of(weights, torch.zeros_like(G)), decay=0.25)
    assert error(product(added(weights, decayed)), 0.75 * product(weights)) < FP32


# ---- the scaling c


def test_one_learning_rate_moves_the_adapted_weight_alike_for_every_scaling():
    m, n, r, lr = 40, 56, 6, 1e-2
    weights, G = factors(m, n, r)
    of_a, of_b = Matrix.whole((r, n)), Matrix.whole((m, r))

    def step_of_weight(c, divide=True):
        """The change of c·BA for an adapter whose c·BA is that of c = 1."""
        adapter = Pair(weights.a, weights.b / c)
        step = lr * pair_step_size("match_rms_adamw", of_a, of_b, c if divide else 1.0)
        return c * moved(adapter, PRODUCT(adapter, gradients_of(adapter, G, c), step=step))

    expected = step_of_weight(1.0)
    target = lr * 0.2 * math.sqrt(max(m, n))
    assert target / 2 < spectral_norm(expected) <= 1.01 * target
    for c in (0.5, 2.0, 16.0):
        assert error(step_of_weight(c), expected) < FP32
        assert error(step_of_weight(c, divide=False), expected) > 0.4


def test_the_step_size_is_that_of_the_base_weight():
    of_a, of_b = Matrix.whole((4, 32)), Matrix.whole((128, 4))  # base weight (128, 32)
    assert pair_step_size("spectral", of_a, of_b, 1.0) == 2.0
    assert pair_step_size("spectral", of_a, of_b, 4.0) == 0.5
    assert pair_step_size("none", of_a, of_b, -4.0) == 0.25
    assert pair_step_size("match_rms_adamw", of_a, of_b, 1.0) == 0.2 * math.sqrt(128)
    open_a, open_b = Matrix.whole((4, 32), None), Matrix.whole((128, 4), None)
    assert pair_step_size("match_rms_adamw", open_a, open_b, 1.0) == 0.2 * math.sqrt(128)
    with pytest.raises(ValueError, match="which side of a 128 by 32 matrix is fan_out"):
        pair_step_size("spectral", open_a, open_b, 1.0)
    with pytest.raises(ValueError, match="scaling 0"):
        pair_step_size("none", of_a, of_b, 0.0)
