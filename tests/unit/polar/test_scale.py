"""Scaling: by powers of two without a change of digits, then to singular values of at most one."""

from __future__ import annotations

import pytest
import torch

from hf_muon.polar.kernels import TORCH
from hf_muon.polar.scale import (
    inverse_power_of_two,
    prescale,
    unit_frobenius_,
    unit_schatten_,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_power_of_two_is_exact(dtype):
    span = 125 if dtype == torch.float32 else 1021
    exponents = torch.arange(-span, span + 1)
    powers = torch.ldexp(torch.ones(len(exponents), dtype=dtype), exponents)
    for digits in (1.0, 1.5, 2 - torch.finfo(dtype).eps):
        assert torch.equal(inverse_power_of_two(powers * digits), powers.flip(0))
    assert not torch.equal(inverse_power_of_two(powers * 2), powers.flip(0))


def test_inverse_power_of_two_of_the_extremes_is_finite_and_positive():
    extremes = torch.tensor([0.0, 1e-45, torch.finfo(torch.float32).max, torch.inf])
    factors = inverse_power_of_two(extremes)
    assert factors.isfinite().all()
    assert (factors > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaling_changes_no_digit(dtype):
    x = torch.randn(3, 4, 5) * torch.tensor([1e-11, 1.0, 1e11]).reshape(3, 1, 1)
    scaled = prescale(x, torch.empty_like(x, dtype=dtype))
    assert scaled.data_ptr() != x.data_ptr()
    digits, expected = (torch.frexp(y.float()).mantissa for y in (scaled, x.to(dtype)))
    assert torch.equal(digits, expected)
    assert not torch.equal(torch.frexp(3 * scaled.float()).mantissa, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_each_matrix_gets_its_own_factor(dtype):
    x = torch.ones(4, 2, 3) * torch.tensor([1e-30, 1.3, 1e30, 0.0]).reshape(4, 1, 1)
    largest = prescale(x, torch.empty_like(x, dtype=dtype)).amax(dim=(-2, -1))
    assert (largest[:3] >= 1).all()
    assert (largest[:3] <= 2).all()  # rounding to half precision can reach 2
    assert largest[3] == 0


def test_float16_is_scaled_before_the_cast():
    x = torch.full((2, 3), 1e6)
    assert x.half().isinf().all()
    assert prescale(x, torch.empty_like(x, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("start", [unit_frobenius_, unit_schatten_])
def test_float16_norms_do_not_overflow(start):
    x = torch.full((300, 300), 2.0, dtype=torch.float16)
    assert (x.float() ** 2).sum() > torch.finfo(torch.float16).max
    start(x, products=TORCH, out=x.new_empty(300, 300))
    # One singular value, so that both norms are it, up to the margin of half a per cent; float16
    # rounds each entry of the quotient to 5e-4 of it.
    assert x.float().norm().item() == pytest.approx(1, rel=7e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 40), (3, 6, 40)])
def test_every_matrix_has_unit_norm(shape, dtype):
    # Sums of float32, and a norm that is rounded to the dtype.
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    for start, order, expected in ((unit_frobenius_, 2, 1.0), (unit_schatten_, 4, 1.01**-0.5)):
        x = torch.randn(shape).to(dtype)
        A = start(x, products=TORCH, out=x.new_empty(*shape[:-1], shape[-2]))
        values = torch.linalg.svdvals(x.float())
        norms = (values**order).sum(-1) ** (1 / order)
        torch.testing.assert_close(norms, torch.full_like(norms, expected), rtol=rounding, atol=0)
        torch.testing.assert_close(A, x @ x.mT, rtol=4 * rounding, atol=4 * rounding)


def test_the_schatten_norm_is_the_tighter_bound():
    x = torch.randn(64, 64)
    largest = {}
    for start in (unit_frobenius_, unit_schatten_):
        y = x.clone()
        start(y, products=TORCH, out=torch.empty_like(y))
        largest[start] = torch.linalg.svdvals(y)[0].item()
    assert 2 * largest[unit_frobenius_] < largest[unit_schatten_] < 1
