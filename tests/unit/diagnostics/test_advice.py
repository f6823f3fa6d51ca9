"""Advice: drift and windows of streams whose truth is known."""

import math
from dataclasses import replace

import pytest
import torch

from hf_muon import diagnostics as d
from hf_muon.diagnostics.advice import (
    advise,
    best_window,
    drift_between,
    in_words,
    is_far_enough,
    smallest_window,
)
from hf_muon.diagnostics.spectra import StepMatrices, measure
from hf_muon.diagnostics.synthetic import spiked_stream
from tests.reference.spectra import Spike
from tests.unit.diagnostics.streams import momentum_of

M, N = 96, 64
STRENGTHS = (1.2, 0.9)


def samples(window, drift, seed=0, strengths=STRENGTHS, distance=50):
    """The leading parts of two samples of a stream that has run in."""
    steps = [400 - distance, 400]
    average, found = torch.zeros(M, N), []
    stream = spiked_stream(
        M, N, strengths, steps=400, sigma=1 / math.sqrt(M), drift=drift, seed=seed
    )
    for number, step in enumerate(stream, start=1):
        G = step.gradient
        average.lerp_(G, 1 - momentum_of(window))
        if number in steps:
            at = StepMatrices(G, average, G, G, average, None)
            found.append(measure(number, at, momentum_of(window), 2)[1])
    return found


def mean_advice(window, drift, count=4):
    advice = [advise(*samples(window, drift, seed), momentum_of(window)) for seed in range(count)]
    return {name: sum(a[name] for a in advice) / count for name in advice[0]}


@pytest.mark.parametrize("window", [10, 20])
@pytest.mark.parametrize("drift", [0.003, 0.006])
def test_drift_is_measured(window, drift):
    # Single pairs of samples scatter by 20 %.
    assert mean_advice(window, drift)["drift"] == pytest.approx(drift, rel=0.25)


def test_a_signal_that_stands_still_has_no_drift_and_asks_for_a_longer_window():
    advice = mean_advice(20, 0.0)
    assert advice["drift"] < 5e-4
    # Four times the window it was measured in.
    assert advice["suggested_momentum"] == pytest.approx(momentum_of(80), abs=1e-3)


def test_the_suggestion_does_not_depend_on_where_it_was_measured():
    suggested = [1 / (1 - mean_advice(window, 0.006)["suggested_momentum"]) for window in (10, 50)]
    assert suggested[0] == pytest.approx(suggested[1], rel=0.2)


def test_the_suggested_window_aligns_best_with_a_signal_that_turns():
    drift = 0.006
    best = 1 / (1 - mean_advice(20, drift)["suggested_momentum"])
    alignments = {}
    for window in (best / 4, best, best * 4):
        average, total = torch.zeros(8, M, N), 0.0
        stream = spiked_stream(
            M, N, STRENGTHS, steps=400, sigma=1 / math.sqrt(M), drift=drift, batch=(8,), seed=9
        )
        for number, step in enumerate(stream):
            average.lerp_(step.gradient, 1 - momentum_of(window))
            if number % 50 == 49 and number > 200:
                # The two leading directions, which is where a polar factor's signal is.
                total += d.signal_alignment(average, step.signal, rank=2).mean().item()
        alignments[window] = total
    assert max(alignments, key=alignments.get) == best


def test_too_fast_a_turn_gives_no_drift_but_still_a_smallest_window():
    # A right angle between the samples. More could not be told from less.
    advice = advise(*samples(5, math.pi / 100), momentum_of(5))
    assert advice.keys() == {"t_min"}


def test_where_nothing_is_visible_nothing_is_advised():
    before, now = samples(20, 0.0, strengths=())
    assert now.strengths == []
    assert advise(before, now, momentum_of(20)) == {}
    assert drift_between(before, now) is None


def test_the_smallest_window_is_where_a_spike_becomes_visible():
    strength = 0.4
    window = smallest_window(strength, 1 / math.sqrt(M), (M, N))
    assert window > 2
    assert not Spike(M, N, strength, 0.99 * window).is_visible
    assert Spike(M, N, strength, 1.01 * window).is_visible


def test_the_best_window_has_the_least_error():
    _, now = samples(20, 0.003)
    drift = 0.003
    noise = sum((M + N) * now.noise.gradient**2 / one**2 for one in now.strengths)
    noise /= len(now.strengths)

    def error(window):
        return 2 * (window * drift) ** 2 + noise / (2 * window)

    best = best_window(drift, now)
    assert error(best) < min(error(0.9 * best), error(1.1 * best))
    assert best_window(0.0, now) == math.inf


def test_samples_within_two_windows_share_noise():
    before, now = samples(20, 0.0)
    assert is_far_enough(before, now, momentum_of(20))
    assert not is_far_enough(replace(before, step=now.step - 39), now, momentum_of(20))


def test_words_hold_what_was_measured():
    advice = {"visible_rank": 2.0, "t_min": 4.0, "drift": 0.01, "suggested_momentum": 0.97}
    text = in_words([advice, {"visible_rank": 2.0}])
    assert text.startswith("2 directions")
    assert "momentum=0.9700" in text
    assert in_words([{"visible_rank": 0.0}]) == "0 directions stand above the noise"
