"""``momentum="auto"``: what it chooses where the best window is known."""

import pytest
import torch

from hf_muon.diagnostics.synthetic import spiked_stream
from hf_muon.optimizer import auto_momentum
from tests.unit.optimizer.test_family import trained


@pytest.mark.parametrize(("drift", "best"), [(0.003, 50), (0.01, 20), (0.03, 10)])
def test_auto_finds_the_window_for_a_drift(drift, best):
    made = spiked_stream(64, 64, [0.5], steps=900, sigma=1 / 8, drift=drift, seed=3)
    chosen = 1 / (1 - auto_chosen([one.gradient for one in made])[0])
    places = [auto_momentum.WINDOWS.index(round(window)) for window in (chosen, best)]
    assert abs(places[0] - places[1]) <= 1


def test_one_gradient_does_not_decide_for_auto():
    made = spiked_stream(64, 64, [2.0], steps=500, sigma=1 / 8, seed=1)
    gradients = [one.gradient for one in made]
    gradients[60] = 1e20 * torch.randn(64, 64)
    assert auto_chosen(gradients, prefilter="norm")[0] >= 0.98
    # Without it long averages are full of that gradient, and the shortest is the best.
    assert auto_chosen(gradients) == [0.8]


def test_auto_prefers_nothing_on_noise_and_long_windows_on_a_fixed_signal():
    noise = [one.gradient for one in spiked_stream(64, 64, [], steps=600, batch=(4,), seed=1)]
    assert auto_chosen(noise) == [0.95] * 4
    fixed = [one.gradient for one in spiked_stream(64, 64, [2.0], steps=600, sigma=1 / 8, seed=1)]
    assert auto_chosen(fixed)[0] >= 0.98


def auto_chosen(gradients, **more):
    start = torch.zeros_like(gradients[0])
    # One Newton-Schulz step: the choice does not look at updates.
    settings = {"polar_method": "newton_schulz", "coefficients": "quintic", "polar_steps": 1}
    _, optimizer = trained(start, gradients, momentum="auto", **settings, **more)
    [state] = optimizer.state.values()
    return [round(beta, 4) for beta in auto_momentum.momenta_in_use(state["momentum_scores"])]
