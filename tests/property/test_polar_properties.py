"""Claims that hold for every matrix, tried on many."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hf_muon.polar import METHODS, polar_factor
from tests.reference import polar as reference

# Continuous integration wants the same examples every time; elsewhere, new ones are welcome.
many = settings(derandomize="CI" in os.environ, max_examples=60, deadline=None)

LONGEST = 24


@st.composite
def matrices(draw):
    """Batches of any rank, orientation and storage, with the method to try on them."""
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    m, n = draw(st.tuples(*[st.integers(1, LONGEST)] * 2))
    rank = draw(st.integers(1, min(m, n)))
    seed = draw(st.integers(0, 2**20))
    count = max(1, torch.Size(batch).numel())
    stack = torch.stack(
        [reference.low_rank(m, n, rank, seed=seed + 2 * i) for i in range(count)]
    ).reshape(*batch, m, n)
    storage = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if storage == "transposed":
        return stack.mT.contiguous().mT
    if storage == "strided":
        return stack.repeat_interleave(2, dim=-1)[..., ::2]
    return stack


def close(actual, expected, tolerance):
    """Relative in Frobenius norm, with zero close to zero only."""
    return (actual - expected).norm() <= tolerance * expected.norm()


@many
@given(x=matrices(), method=st.sampled_from(METHODS), exponent=st.floats(-30, 30))
def test_scale_does_not_matter_in_float32(x, method, exponent):
    x = x.float()
    unit = x / x.norm()
    rank = torch.linalg.matrix_rank(unit.double(), rtol=1e-4)
    if (rank < min(x.shape[-2:])).any() or torch.linalg.cond(unit).max() > 1e3:
        # Rounding by the scale feeds a null space; what becomes of it is noise, but finite noise.
        assert polar_factor(unit * 10**exponent, method=method, dtype="float32").isfinite().all()
        return
    factor = polar_factor(unit, method=method, dtype="float32")
    # Scaling rounds every entry (6e-8); the iteration multiplies the smallest singular values, here
    # down to 1e-3, by up to 1e3.
    scaled = polar_factor(unit * 10**exponent, method=method, dtype="float32")
    assert close(scaled, factor, 1e-3)
    assert not close(polar_factor(-unit, method=method, dtype="float32"), factor, 1e-3)


@many
@given(x=matrices(), method=st.sampled_from(METHODS))
def test_shape_dtype_and_input_are_kept_and_storage_does_not_matter(x, method):
    x = x.float()
    before = x.clone()
    factor = polar_factor(x, method=method)
    assert factor.shape == x.shape
    assert factor.dtype == x.dtype
    assert factor.isfinite().all()
    assert torch.equal(x, before)
    assert torch.equal(factor, polar_factor(x.contiguous(), method=method))


@many
@given(
    x=matrices(), method=st.sampled_from(METHODS), dtype=st.sampled_from(["float32", "bfloat16"])
)
def test_singular_values_stay_near_one_or_below(x, method, dtype):
    factor = polar_factor(x, method=method, dtype=dtype)
    # Both families overshoot to 1.2 at most; bfloat16 rounds sums of 24 terms to some per cent.
    assert torch.linalg.svdvals(factor).max() < 1.3


@many
@given(x=matrices(), method=st.sampled_from(METHODS))
def test_transposing_commutes_unless_square(x, method):
    m, n = x.shape[-2:]
    if m != n:
        factor = polar_factor(x.float(), method=method)
        assert torch.equal(polar_factor(x.float().mT, method=method), factor.mT)


@many
@given(x=matrices(), method=st.sampled_from(METHODS))
def test_a_batch_equals_its_matrices(x, method):
    x = x.float()
    whole = polar_factor(x, method=method, dtype="float32").reshape(-1, *x.shape[-2:])
    exact = min(x.shape[-2:]) >= 16 and method != "svd"
    for one, expected in zip(x.reshape(-1, *x.shape[-2:]), whole, strict=True):
        alone = polar_factor(one, method=method, dtype="float32")
        if exact:
            assert torch.equal(alone, expected)
        elif torch.linalg.cond(one).item() < 1e3:
            # Other kernels for matrices this small: float32 rounding times the condition.
            assert close(alone, expected, 1e-3)


@many
@given(x=matrices())
def test_svd_equals_the_definition(x):
    if torch.linalg.cond(x).max() < 1e6:
        # float64: ε times the condition number.
        assert close(polar_factor(x, method="svd"), reference.polar_factor(x), 1e-8)


@many
@given(
    shape=st.tuples(*[st.integers(0, 6)] * 3),
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_zero_in_zero_out(shape, method, dtype):
    zero = torch.zeros(shape, dtype=dtype)
    assert torch.equal(polar_factor(zero, method=method), zero)
    if zero.numel():
        assert not torch.equal(polar_factor(zero + 1, method=method), zero)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_columns_become_unit_vectors(method):
    row = reference.matrix(1, 40)
    expected = row / row.norm()
    for x, unit in ((row, expected), (row.mT, expected.mT)):
        # One singular value: the iteration leaves it within 0.06 of one, in the exact direction.
        factor = polar_factor(x, method=method, dtype="float64")
        assert close(factor / factor.norm(), unit, 1e-12)
        assert 0.93 < factor.norm() < 1.07
