"""The noise edge: false alarms, noise that is not white, and the closed forms for a spike."""

import math

import pytest
import torch

from hf_muon.diagnostics.noise_edge import cosines_squared, noise_in, signal_strength
from hf_muon.diagnostics.synthetic import spiked_stream
from tests.reference.spectra import Spike
from tests.unit.diagnostics.streams import last_averages, momentum_of

WINDOW = 20


def gradient_and_average(m, n, strengths=(), batch=100, **settings):
    stream = spiked_stream(m, n, strengths, steps=5 * WINDOW, batch=(batch,), **settings)
    averages, last = last_averages(stream, [WINDOW])
    return last.gradient, averages[WINDOW]


def edges(G, M):
    return [noise_in(g, a, momentum_of(WINDOW)) for g, a in zip(G, M, strict=True)]


@pytest.mark.parametrize("shape", [(32, 32), (48, 96), (96, 48)])
@pytest.mark.parametrize("noise", ["gaussian", "arch"])
def test_noise_alone_is_visible_in_few_of_a_hundred_draws(shape, noise):
    G, M = gradient_and_average(*shape, noise=noise)
    top = torch.linalg.svdvals(M)[:, 0].tolist()
    # 1 % is asked for; of 100 draws 5 or more then have a probability of 0.4 %.
    assert sum(s > at.edge for s, at in zip(top, edges(G, M), strict=True)) < 5
    # and without the margin it would be half of them.
    assert sum(s > at.edge / 1.1 for s, at in zip(top, edges(G, M), strict=True)) > 10


def test_white_noise_is_measured():
    G, M = gradient_and_average(96, 64, sigma=0.3)
    measured = [at.gradient for at in edges(G, M)]
    # σ₁ of finite noise lies 2 % below its limit s(√m + √n) on average.
    assert sum(measured) / len(measured) == pytest.approx(0.3, rel=0.05)
    assert edges(G, M)[0].filtered * math.sqrt(2 * WINDOW - 1) == pytest.approx(
        edges(G, M)[0].gradient
    )


def test_noise_of_unequal_rows_and_columns_is_not_taken_for_signal():
    G, M = gradient_and_average(64, 64)
    scale = torch.logspace(0, -2, 64)  # rows and columns from 1 to 1/100
    G, M = (scale[:, None] * X * scale for X in (G, M))
    sigma = torch.linalg.svdvals(M)
    # Few rows and columns decide, so that norms scatter more than those of white noise.
    assert sum(s > at.edge for s, at in zip(sigma[:, 0].tolist(), edges(G, M), strict=True)) < 20
    # The edge that the median singular value of white noise would give (μ = 0.653 for γ = 1).
    by_median = sigma.quantile(0.5, dim=1) / math.sqrt(0.653) * 2
    assert (sigma > by_median[:, None]).sum(1).float().mean() > 20


def test_a_signal_above_the_edge_is_counted_and_cancels_from_it():
    strengths = (1.5, 1.0)
    m, n = 96, 64
    G, M = gradient_and_average(m, n, strengths, sigma=1 / math.sqrt(m), batch=20)
    quiet, quiet_M = gradient_and_average(m, n, sigma=1 / math.sqrt(m), batch=20)
    with_signal, without = (
        sum(at.edge for at in edges(*pair)) / 20 for pair in ((G, M), (quiet, quiet_M))
    )
    # What is left of the signal after five windows is 1 % of it.
    assert with_signal == pytest.approx(without, rel=0.05)
    sigma = torch.linalg.svdvals(M)
    ranks = [int((s > at.edge).sum()) for s, at in zip(sigma, edges(G, M), strict=True)]
    assert sum(rank == 2 for rank in ranks) >= 18


@pytest.mark.parametrize("shape", [(200, 100), (100, 200)])
@pytest.mark.parametrize("window", [4, 20])
def test_closed_forms_are_those_of_a_spike(shape, window):
    m, n = shape
    strength = 1.3
    spike = Spike(m, n, strength, window)
    deviation = spike.sigma_T / math.sqrt(m)
    assert signal_strength(spike.top, deviation, shape) == pytest.approx(strength)
    left, right = cosines_squared(strength, deviation, shape)
    assert left == pytest.approx(1 - spike.sin_left**2)
    assert right == pytest.approx(1 - spike.sin_right**2)


def test_an_invisible_signal_has_no_strength_and_no_cosine():
    m, n = 100, 50
    weak = Spike(m, n, 0.3, 1)
    assert not weak.is_visible
    assert signal_strength(weak.edge, 1 / math.sqrt(m), (m, n)) == 0
    assert cosines_squared(0.3, 1 / math.sqrt(m), (m, n)) == (0, 0)


def test_without_averaging_there_is_no_edge():
    G = torch.randn(8, 8)
    assert noise_in(G, G, 0.0) is None
    assert noise_in(G, G, 0.9) is None
