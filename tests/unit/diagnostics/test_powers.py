"""Noise and signal of gradients, from G and M: unbiased on streams whose truth is known."""

import math
import statistics

import pytest
import torch

from hf_muon.diagnostics.noise_edge import powers_in
from hf_muon.diagnostics.spectra import StepMatrices, measure

M_ROWS, N_COLS = 24, 40


def signal(norm):
    torch.manual_seed(1)
    S = torch.outer(torch.randn(M_ROWS), torch.randn(N_COLS))
    return norm * S / S.norm()


def streams(S, beta, draw, count=80):
    """G and M at the end of independent streams, after ten windows."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        M = S.clone()  # the average of S, so that only the noise has to run in
        for _ in range(round(10 / (1 - beta))):
            G = S + draw(generator)
            M = beta * M + (1 - beta) * G
        yield G, M


def white(generator, deviation=0.3):
    return deviation * torch.randn(M_ROWS, N_COLS, generator=generator)


def rows_of_different_size(generator):
    return torch.linspace(0, 0.6, M_ROWS)[:, None] * torch.randn(
        M_ROWS, N_COLS, generator=generator
    )


def of_two_signs(generator):
    """One entry drawn at a time, as gradients of rare tokens are; of mean zero."""
    drawn = torch.zeros(M_ROWS * N_COLS)
    at = torch.randint(M_ROWS * N_COLS, (1,), generator=generator)
    drawn[at] = 10.0 * (2 * torch.randint(2, (1,), generator=generator) - 1)
    return drawn.view(M_ROWS, N_COLS)


NOISES = {
    "white": (white, 0.09 * M_ROWS * N_COLS),
    "rows": (
        rows_of_different_size,
        N_COLS * torch.linspace(0, 0.6, M_ROWS).square().sum().item(),
    ),
    "sparse": (of_two_signs, 100.0),
}


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("norm", [0.0, 3.0, 30.0])
def test_both_powers_are_unbiased(noise, norm, beta):
    draw, trace = NOISES[noise]
    found = [powers_in(G, M, beta) for G, M in streams(signal(norm), beta, draw)]
    for values, truth in (
        ([one.noise for one in found], trace),
        ([one.signal for one in found], norm**2),
    ):
        error = statistics.stdev(values) / math.sqrt(len(values))
        # Four standard errors of the mean, and rounding where every draw gives the same.
        assert abs(statistics.mean(values) - truth) < 4 * error + 1e-4 * (truth + 1)


def test_what_a_naive_estimate_would_say_is_far_off():
    draw, trace = NOISES["white"]
    pairs = list(streams(signal(3.0), 0.9, draw, count=100))
    naive = statistics.mean(M.square().sum().item() for _, M in pairs)
    assert naive > 1.4 * 9  # the noise that is left in M counts as signal
    noise = statistics.mean((G - M).square().sum().item() for G, M in pairs)
    assert noise < 0.9 * trace  # M_t shares the noise of G_t


def test_the_ratio_of_a_sample_is_in_the_numbers_and_left_out_where_it_has_no_meaning():
    beta = 0.9
    draw, trace = NOISES["white"]
    G, M = next(streams(signal(30.0), beta, draw, count=1))
    zero = torch.zeros_like(G)
    values, _ = measure(1, StepMatrices(G, M, G, G, M, None), beta, 1)
    assert values["noise_to_signal"] == values["noise_power"] / values["signal_power"]
    assert values["noise_to_signal"] == pytest.approx(trace / 900, rel=0.1)
    alone, _ = measure(1, StepMatrices(G, (1 - beta) * G, G, G, M, None), beta, 1)  # M_0 = 0
    assert alone["signal_power"] < 0
    assert "noise_to_signal" not in alone
    still, _ = measure(1, StepMatrices(G, G, G, G, G, None), 0.0, 1)
    assert "noise_power" not in still
    nothing, _ = measure(1, StepMatrices(zero, zero, G, G, zero, None), beta, 1)
    assert not {"gradient_nuclear_rank", "gradient_stable_rank", "noise_to_signal"} & set(nothing)
