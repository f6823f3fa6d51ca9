"""What a run's gradients say about filtering, against streams of which the answer is known."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "recipes"))

from study import readings

STEPS, SHAPE = 400, (8, 6)


def stream(at, noise):
    """Gradients of ``STEPS`` steps: what ``at`` gives, and white noise of a Frobenius norm."""
    scale = noise / (SHAPE[0] * SHAPE[1]) ** 0.5
    return [at(step) + scale * torch.randn(SHAPE) for step in range(STEPS)]


def watched(at, noise):
    watch = readings.Watch(STEPS)
    scale = noise / (SHAPE[0] * SHAPE[1]) ** 0.5
    for step, gradient in enumerate(stream(at, noise)):
        watch.see(step, [gradient], lambda step=step: [at(step) + scale * torch.randn(SHAPE)])
    return watch


def signal(step):
    return torch.eye(*SHAPE)


def test_noise_to_signal_is_that_of_the_stream():
    torch.manual_seed(0)
    gradients = signal(0) + 2.0 * torch.randn(4000, *SHAPE)
    noise, square = readings.noise_and_signal([gradients])
    # Standard errors: 4·48·√(2/(48·4000)) = 0.6 of tr Σ = 192, and 2·√6·2/√4000 = 0.16 of ‖G‖² = 6.
    assert noise == pytest.approx(4.0 * 48, abs=2.5)
    assert square == pytest.approx(6.0, abs=0.7)


def test_all_places_are_read_and_no_signal_is_none():
    watch = watched(lambda step: torch.zeros(SHAPE), 1.0)
    assert set(watch.found) == set(watch.noise_to_signal) == {"0.1", "0.5", "0.9"}
    assert any(ratio is None or ratio > 5 for ratio in watch.noise_to_signal.values())


def test_a_window_points_better_than_a_step_where_noise_hides_a_constant_signal():
    torch.manual_seed(0)
    for found in watched(signal, 12.0).found.values():
        assert found["pre_20"] > found["pre_5"] > 0
        assert found["pre_20"] > found["last"] + 0.1
        assert abs(found["oscillation"]) < 0.5  # all of the change is noise, up to its estimate


def test_the_last_step_points_better_where_the_signal_turns_without_noise():
    turning = watched(lambda step: signal(step) * torch.tensor(step / 8).cos(), 1e-3)
    for found in turning.found.values():
        assert found["last"] > found["pre_20"]
        assert found["oscillation"] > 0.9


def test_what_alternates_is_oscillation_and_the_last_step_points_back():
    for found in watched(lambda step: signal(step) * (-1) ** step, 1e-3).found.values():
        assert found["last"] == pytest.approx(-1, abs=0.05)  # five steps of the iteration: ±5 %
        assert found["post_20"] == pytest.approx(0, abs=1e-2)
        assert found["oscillation"] > 0.99
