"""Momentum kernels: closed forms against explicit sums and against a run on white noise."""

import pytest
import torch

from hf_muon.diagnostics.kernels import impulse_response, mean_age, noise_factor
from hf_muon.diagnostics.replay import ema

KERNELS = {
    "one": ((0.95,), (1.0,)),
    "two": ((0.9, 0.98), (0.44, 0.56)),
    "four": ((0.8, 0.9, 0.95, 0.98), (0.25,) * 4),
    "none": ((0.0,), (1.0,)),
}
LAGS = 2000  # 0.98^2000 = 3e-18

every_kernel = pytest.mark.parametrize(("betas", "weights"), KERNELS.values(), ids=KERNELS)
both = pytest.mark.parametrize("nesterov", [False, True])


def output(betas, weights, nesterov, stream):
    """The kernel run step by step, as the definition says."""
    averages = [torch.zeros_like(stream[0]) for _ in betas]
    mu = sum(w * beta for beta, w in zip(betas, weights, strict=True))
    for gradient in stream:
        averages = [
            beta * m + (1 - beta) * gradient for beta, m in zip(betas, averages, strict=True)
        ]
        M = sum(w * m for w, m in zip(weights, averages, strict=True))
        yield (1 - mu) * gradient + mu * M if nesterov else M


@every_kernel
@both
def test_the_response_is_what_an_impulse_leaves(betas, weights, nesterov):
    impulse = torch.zeros(50, 1, dtype=torch.float64)
    impulse[0] = 1
    left = torch.cat(list(output(betas, weights, nesterov, impulse)))
    expected = impulse_response(betas, weights, nesterov, lags=50)
    torch.testing.assert_close(left, torch.tensor(expected, dtype=torch.float64))


@every_kernel
@both
def test_closed_forms_are_the_sums_over_the_response(betas, weights, nesterov):
    h = torch.tensor(impulse_response(betas, weights, nesterov, lags=LAGS), dtype=torch.float64)
    assert h.sum().item() == pytest.approx(1, abs=1e-12)
    assert noise_factor(betas, weights, nesterov) == pytest.approx(h.square().sum().item())
    age = (h * torch.arange(LAGS)).sum().item()
    assert mean_age(betas, weights, nesterov) == pytest.approx(age, abs=1e-9)


@every_kernel
@both
def test_white_noise_is_left_with_that_variance(betas, weights, nesterov):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 64, 64, generator=generator)  # 0.98^400 = 3e-4: run in
    *_, last = output(betas, weights, nesterov, noise)
    # The sample variance of 4096 entries scatters by √(2/4096) = 2.2 %.
    assert last.var().item() == pytest.approx(noise_factor(betas, weights, nesterov), rel=0.08)


@both
def test_one_decay_is_the_moving_average_of_the_optimizer(nesterov):
    impulse = torch.zeros(20, 1, 1, dtype=torch.float64)
    impulse[0] = 1
    left = torch.cat(list(ema(0.95, nesterov)(impulse))).flatten()
    expected = impulse_response((0.95,), (1.0,), nesterov, lags=20)
    torch.testing.assert_close(left, torch.tensor(expected, dtype=torch.float64))
    assert noise_factor((0.95,), (1.0,)) == pytest.approx(1 / (2 * 20 - 1))
    assert mean_age((0.95,), (1.0,)) == pytest.approx(20 - 1)


@pytest.mark.parametrize(
    ("betas", "weights", "message"),
    [
        ((), (), "one decay at least"),
        ((0.9, 0.98), (1.0,), "a weight for each decay"),
        ((1.0,), (1.0,), r"in \[0, 1\)"),
        ((0.9, 0.98), (0.5, 0.6), "sum to 1.1"),
    ],
)
@pytest.mark.parametrize("function", [impulse_response, noise_factor, mean_age])
def test_what_makes_no_average_is_refused(function, betas, weights, message):
    with pytest.raises(ValueError, match=message):
        function(betas, weights)
