"""Replay gives the updates of the optimizer, and lets other filters stand in their places."""

import math
from collections import deque
from functools import partial

import pytest
import torch

from hf_muon import Muon, diagnostics, polar_factor
from hf_muon.diagnostics.replay import ema
from hf_muon.distributed.layout import Matrix
from hf_muon.optimizer.scaling import step_size
from hf_muon.optimizer.writes import apply_update
from tests.reference.muon import exact_polar

ORDERS = ("pre_polar", "post_polar", "polar_only")
SHAPES = ((24, 40), (40, 24), (32, 32), (1, 16))


def gradients_for(*shape, steps=20):
    return torch.randn(steps, *shape)


def replay(gradients, *arguments, **settings):
    return diagnostics.replay(gradients, *arguments, **settings)


# --- the optimizer --------------------------------------------------------------------------------


def trained(start, gradients, **settings):
    w = torch.nn.Parameter(start.clone())
    optimizer = Muon([w], lr=0.02, weight_decay=0.1, polar_method="svd", **settings)
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    return w.detach()


def applied(start, updates):
    """The weight after the optimizer's own write of each update."""
    w, scale = start.clone(), step_size("match_rms_adamw", Matrix.whole(start.shape))
    for update in updates:
        apply_update([w], [update], lr=0.02, scale=scale, weight_decay=0.1, cautious=False)
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_replay_is_the_optimizer_bit_for_bit(order, nesterov, shape):
    start, gradients = torch.randn(shape), gradients_for(*shape)
    updates = replay(gradients, order, 0.9, nesterov)
    expected = trained(start, gradients, order=order, momentum=0.9, nesterov=nesterov)
    assert updates.shape == gradients.shape
    assert torch.equal(applied(start, updates), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "post_polar", "match_update_rms": True},
        {"order": "post_polar"},
        {"order": "pre_polar"},
    ],
)
def test_a_replay_with_other_settings_is_another_optimizer(settings):
    start, gradients = torch.randn(24, 40), gradients_for(24, 40)
    expected = trained(start, gradients, **settings)
    for other in ({"order": "polar_only"}, {**settings, "momentum": 0.9}):
        assert not torch.equal(applied(start, replay(gradients, **other)), expected)
    assert torch.equal(applied(start, replay(gradients, **settings)), expected)


@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
def test_replay_runs_the_iterations_too(method):
    settings = {"polar_method": method, "coefficients": "quintic", "polar_steps": 4}
    start, gradients = torch.randn(24, 40), gradients_for(24, 40)
    w = torch.nn.Parameter(start.clone())
    optimizer = Muon([w], lr=0.02, weight_decay=0.1, **settings)
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(applied(start, replay(gradients, **settings)), w.detach())


def test_leading_dimensions_are_independent_matrices():
    gradients = gradients_for(3, 6, 9)
    for order in ORDERS:
        whole = replay(gradients, order)
        for index in range(3):
            # Batched and single decompositions agree to rounding.
            torch.testing.assert_close(whole[:, index], replay(gradients[:, index], order))


def test_the_gradients_are_not_changed():
    gradients = gradients_for(6, 9)
    before = gradients.clone()
    for order in ORDERS:
        replay(gradients, order)
    assert torch.equal(gradients, before)


def test_a_list_of_gradients_does_as_well():
    gradients = gradients_for(6, 9)
    assert torch.equal(replay(list(gradients)), replay(gradients))


def test_without_momentum_the_orders_agree():
    gradients = gradients_for(6, 9)
    for order in ORDERS:
        assert torch.equal(replay(gradients, order, 0.0), replay(gradients, "polar_only"))


# --- sizes ----------------------------------------------------------------------------------------


def rms(updates):
    return updates.square().mean((-2, -1)).sqrt()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_matched_updates_have_one_rms_in_all_orders(shape):
    gradients = gradients_for(*shape)
    size = 1 / math.sqrt(max(shape))
    for order, matched in (("pre_polar", False), ("post_polar", True), ("polar_only", False)):
        updates = replay(gradients, order, match_update_rms=matched)
        torch.testing.assert_close(rms(updates), torch.full((20,), size), rtol=0.01, atol=0)
    assert (rms(replay(gradients, "post_polar")) < 0.5 * size).all()


def test_averages_of_polar_factors_of_noise_shrink_by_the_root_of_2T_minus_1():
    gradients = gradients_for(8, 32, 32, steps=100)
    size = rms(replay(gradients, "post_polar", 0.9, nesterov=False)[-1]).mean()
    # Eight matrices of 1,024 entries: the RMS is known to 0.8 %.
    assert size.item() == pytest.approx(1 / math.sqrt(32 * 19), rel=0.03)


# --- filters of one's own -------------------------------------------------------------------------


def exact(gradients):
    return torch.stack([exact_polar(g) for g in gradients]).float()


def assert_same_directions(actual, expected):
    # float32 decompositions of matrices whose condition is a few hundred at most.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_clipped_entries_go_into_the_momentum():
    gradients = gradients_for(6, 9)
    clip = partial(torch.clamp, min=-0.5, max=0.5)
    updates = replay(gradients, before=partial(map, clip))
    assert torch.equal(updates, replay(clip(gradients)))
    assert not torch.equal(updates, replay(gradients))


def three_tap(stream):
    """A finite impulse response: the mean of the last three, with zeros before the first."""
    window = deque(maxlen=3)
    for x in stream:
        window.append(x)
        yield sum(window) / 3


def test_a_finite_impulse_response_takes_the_place_of_the_momentum():
    gradients = gradients_for(6, 9)
    padded = torch.cat([torch.zeros(2, 6, 9), gradients])
    averages = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    assert_same_directions(replay(gradients, "polar_only", before=three_tap), exact(averages))


def test_a_recursive_filter_takes_the_place_of_the_momentum():
    def recursive(stream):
        y = 0
        for x in stream:
            y = 0.9 * y + 0.1 * x
            yield y

    gradients = gradients_for(6, 9)
    expected = replay(gradients, "pre_polar", 0.9, nesterov=False)
    assert_same_directions(replay(gradients, "polar_only", before=recursive), expected)


def test_filters_on_both_sides_of_the_polar_factor():
    gradients = gradients_for(6, 9)
    both = replay(gradients, "pre_polar", 0.9, nesterov=False, after=ema(0.5))
    factors = replay(gradients, "pre_polar", 0.9, nesterov=False)
    average, expected = torch.zeros(6, 9), []
    for factor in factors:
        average = 0.5 * average + 0.5 * factor
        expected.append(average)
    torch.testing.assert_close(both, torch.stack(expected))


def test_a_filter_starts_afresh_in_every_replay():
    gradients, smooth = gradients_for(6, 9), ema(0.9)
    first = replay(gradients, "polar_only", before=smooth)
    assert torch.equal(replay(gradients, "polar_only", before=smooth), first)


def test_the_momentum_filter_keeps_what_it_has_given():
    given = list(ema(0.5)(torch.ones(3, 2, 2)))
    assert [x[0, 0].item() for x in given] == [0.5, 0.75, 0.875]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "pre_polr"}, "pre_polr.*Did you mean 'pre_polar'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"order": "pre_polar", "match_update_rms": True}, "needs order='post_polar'"),
        ({"polar_method": "qr"}, "polar_method='qr'"),
        ({"polar_stepz": 3}, "polar_steps"),
        ({"before": lambda stream: list(stream)[:2]}, "2 steps out of 4"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replay(gradients_for(4, 4, steps=4), **settings)


def test_no_gradients_are_refused():
    with pytest.raises(ValueError, match="no gradient to replay"):
        replay([])


def test_the_oracle_is_the_exact_polar_factor():
    x = torch.randn(6, 9)
    torch.testing.assert_close(exact([x])[0], polar_factor(x, method="svd"))
