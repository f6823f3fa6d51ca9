"""Scaling by powers of two: exact, bounded, and absent where it is not needed."""

from __future__ import annotations

import pytest
import torch

from hf_muon.polar.scale import inverse_power_of_two, prescale, unit_frobenius_


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
def test_ordinary_matrices_keep_every_bit(dtype):
    x = torch.randn(3, 4, 5) * torch.tensor([1e-11, 1.0, 1e11]).reshape(3, 1, 1)
    scaled = prescale(x, dtype)
    assert torch.equal(scaled, x.to(dtype))
    assert scaled.data_ptr() != x.data_ptr()
    assert not torch.equal(prescale(x * 1e-20, dtype), (x * 1e-20).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_each_extraordinary_matrix_gets_its_own_factor(dtype):
    x = torch.ones(4, 2, 3) * torch.tensor([1e-30, 1.3, 1e30, 0.0]).reshape(4, 1, 1)
    largest = prescale(x, dtype).amax(dim=(-2, -1))
    assert (largest[:3] >= 1).all()
    assert (largest[:3] <= 2).all()  # rounding to half precision can reach 2
    assert largest[3] == 0


def test_float16_is_scaled_before_the_cast():
    x = torch.full((2, 3), 1e6)
    assert x.half().isinf().all()
    assert prescale(x, torch.float16).isfinite().all()


def test_float16_norms_do_not_overflow():
    x = torch.full((300, 300), 2.0, dtype=torch.float16)
    assert (x.float() ** 2).sum() > torch.finfo(torch.float16).max
    # float16 rounds each entry of the quotient to 5e-4 of it.
    assert unit_frobenius_(x).float().norm().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("shape", [(6, 40), (3, 6, 40)])
def test_every_matrix_has_unit_norm(shape):
    norms = torch.linalg.matrix_norm(unit_frobenius_(torch.randn(shape)))
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=0)  # float32 sums
