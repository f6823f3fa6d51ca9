"""Bases from Gram matrices, as accelerators make them: those of a QR decomposition, rank or not."""

import pytest
import torch

from hf_muon.optimizer.lora import Pair
from hf_muon.optimizer.lora_tangent import orthonormal, polar_of_product
from hf_muon.polar import devices
from tests.reference import lora as reference
from tests.reference.polar import polar_factor
from tests.unit.optimizer.pairs import (
    EXACT,
    FP32,
    ITERATED,
    TANGENT,
    change_error,
    error,
    factors,
    gradients_of,
)


@pytest.fixture
def _as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(devices, "is_cpu", lambda device: False)


def columns(condition, m=80, k=12, lead=()):
    """Columns whose singular values fall from 1 to 1/condition."""
    U, _ = torch.linalg.qr(torch.randn(*lead, m, k, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(*lead, k, k, dtype=torch.float64))
    sizes = torch.tensor(condition, dtype=torch.float64) ** -torch.linspace(0, 1, k)
    return ((U * sizes) @ V.mT).float()


@pytest.mark.usefixtures("_as_on_an_accelerator")
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_columns_of_full_rank_get_an_orthonormal_basis(condition, scale):
    X = scale * columns(condition, lead=(2,))
    Q, R = orthonormal(X)
    assert Q.dtype == R.dtype == torch.float32
    assert error(Q.double() @ R.double(), X.double()) < FP32
    identity = torch.eye(12, dtype=torch.float64).expand(2, 12, 12)
    assert error(Q.double().mT @ Q.double(), identity) < FP32


@pytest.mark.usefixtures("_as_on_an_accelerator")
def test_one_round_is_not_enough(monkeypatch):
    X = columns(1e6).double()
    lower = torch.linalg.cholesky(X.mT @ X + 1e-14 * torch.eye(12))
    once = torch.linalg.solve_triangular(lower, X.mT, upper=False)
    assert error(once @ once.mT, torch.eye(12, dtype=torch.float64)) > 1e-3


def singular():
    """Columns of rank 5 of 12, zeros among them, as [B, dB] has them while B is zero.

    Of whole numbers, so that no rounding adds to the rank.
    """
    first, second = (torch.randint(-4, 5, shape).float() for shape in ((80, 5), (5, 8)))
    return torch.cat([torch.zeros(80, 4), first @ second], dim=1)


@pytest.mark.usefixtures("_as_on_an_accelerator")
def test_without_the_shift_a_singular_gram_matrix_has_no_factor():
    X = singular().double()
    assert torch.linalg.cholesky_ex(X.mT @ X).info > 0
    Q, R = orthonormal(singular())
    assert Q.isfinite().all()
    assert R.isfinite().all()


@pytest.mark.usefixtures("_as_on_an_accelerator")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("left", [singular, lambda: columns(1e4), lambda: torch.zeros(80, 12)])
def test_the_polar_factor_of_a_product_is_that_of_the_whole_matrix(left, dtype, monkeypatch):
    monkeypatch.setattr(devices, "widest", lambda device: dtype)
    L, R = left(), columns(10.0, m=60).mT
    first, second = polar_of_product(L, R, EXACT)
    found = first.double() @ second.double()
    if not L.any():
        assert not found.any()
        return
    # The smallest singular values that are left are 1e-4 of the largest: with 24 bits of L their
    # directions are known to 6e-8/1e-4, from Gram matrices in float32 to some times that.
    bound = 1e-2 if dtype == torch.float32 else 2e-3
    assert error(found, polar_factor(L.double() @ R.double())) < bound
    assert error(-found, polar_factor(L.double() @ R.double())) > 1


def well():
    return factors()


def wide_apart():
    """Rows of A and columns of B of very different lengths."""
    weights, G = factors()
    sizes = torch.logspace(-3, 0, 6)
    return Pair(weights.a * sizes[:, None], weights.b * sizes), G


def deficient():
    weights, G = factors()
    return weights._replace(b=torch.cat([weights.b[:, :3]] * 2, dim=1)), G


def far_apart():
    weights, G = factors()
    return Pair(1e4 * weights.a, 1e-4 * weights.b), G


def few_rows():
    """2r is more than m."""
    return factors(8, 56, 6)


@pytest.mark.parametrize("polar", [EXACT, ITERATED], ids=["exact", "iterated"])
@pytest.mark.parametrize("make", [well, wide_apart, deficient, far_apart, few_rows])
def test_a_step_is_as_close_to_the_oracle_as_with_a_decomposition(make, polar, monkeypatch):
    weights, G = make()
    expected = reference.tangent(*weights, G, step=0.1, damping=1e-3)

    def distance():
        change = TANGENT(weights, gradients_of(weights, G), polar=polar)
        return change_error(weights, change, expected)

    decomposed = distance()
    monkeypatch.setattr(devices, "is_cpu", lambda device: False)
    assert distance() <= 1.1 * decomposed + FP32
    control = reference.tangent(*weights, G, step=0.11, damping=1e-3)
    found = TANGENT(weights, gradients_of(weights, G), polar=EXACT)
    assert change_error(weights, found, control) > 0.05


@pytest.mark.usefixtures("_as_on_an_accelerator")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("polar", [EXACT, ITERATED], ids=["exact", "iterated"])
def test_b_begins_with_zeros(polar, dtype, monkeypatch):
    monkeypatch.setattr(devices, "widest", lambda device: dtype)
    weights, G = factors()
    weights = weights._replace(b=torch.zeros_like(weights.b))
    change = TANGENT(weights, gradients_of(weights, G), polar=polar)
    _, expected = reference.tangent(*weights, G, step=0.1, damping=1e-3)
    assert not change.a.any()
    # Five iterations leave 0.1 to 0.2 of themselves.
    assert error(change.b.double(), expected) < (1e-4 if polar is EXACT else 0.25)
    nothing = Pair(torch.zeros_like(weights.a), weights.b)
    for still in TANGENT(nothing, gradients_of(nothing, G), polar=polar):
        assert not still.any()


def test_a_cpu_takes_the_decomposition():
    X = torch.randn(8, 3)
    assert all(map(torch.equal, orthonormal(X), torch.linalg.qr(X)))
