"""The polar factor: accuracy, agreement with torch, shapes, dtypes and refusals."""

from __future__ import annotations

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from hf_muon.polar import (
    FAMILIES,
    METHODS,
    cheapest_iteration,
    orthogonalize,
    polar_factor,
)
from hf_muon.polar.coefficients import QUINTIC
from tests.reference import polar as reference

ITERATIVE = ("newton_schulz", "gram")
SHAPES = ((96, 96), (96, 256), (256, 96))
DTYPES = ("float32", "bfloat16")


def settings(**changes):
    return {
        "method": "newton_schulz",
        "coefficients": "quintic",
        "steps": 5,
        "dtype": "float32",
    } | changes


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrum", ["gaussian", "1/k"])
@pytest.mark.parametrize("shape", SHAPES)
def test_five_steps_come_as_close_as_their_coefficients_allow(shape, spectrum, dtype):
    exact = reference.matrix(*shape, spectrum)
    oracle = reference.polar_factor(exact)
    x = exact.float()
    # The quintic leaves singular values in [0.68, 1.20]; Polar Express aims at 1 ± 0.12, and the
    # tighter start at 1 ± 0.06, with more of them below its range.
    for name, bound in (("quintic", 0.31), ("polar_express", 0.14), ("tight", 0.14)):
        error = {
            method: reference.relative_error(
                orthogonalize(x, **settings(method=method, coefficients=name, dtype=dtype)), oracle
            )
            for method in ITERATIVE
        }
        assert error["newton_schulz"] <= bound
        assert error["gram"] <= bound + 0.03
        # The same polynomial: only rounding of R and Q in the compute dtype tells them apart.
        assert abs(error["gram"] - error["newton_schulz"]) <= 0.03


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 96), (96, 256), (256, 96)])
def test_four_tight_steps_come_closer_than_five_of_the_quintic(shape, dtype):
    exact = reference.matrix(*shape, "gaussian")
    oracle = reference.polar_factor(exact)

    def error(**chosen):
        factor = orthogonalize(exact.float(), **settings(dtype=dtype, **chosen))
        return reference.relative_error(factor, oracle)

    for method in ITERATIVE:
        assert error(coefficients="tight", steps=4, method=method) < error()
        # Not for the number of steps: four of the others are further away.
        assert error(coefficients="polar_express", steps=4, method=method) > error()


@pytest.mark.parametrize("steps", range(3, 9))
def test_tight_stays_bounded_on_rank_deficient_and_ill_conditioned_matrices(steps):
    # 1 + E of the composition, which equals 2 − p(ℓ), and bfloat16's rounding.
    lowest = 3e-3 * 2.0 ** (4 - steps)
    for a, b, c in FAMILIES["tight"].rows[steps - 3]:
        lowest = a * lowest + b * lowest**3 + c * lowest**5
    bound = 2 - lowest + 0.03
    for seed in range(20):
        rows, cols = [(9, 16), (16, 40), (33, 33), (64, 96)][seed % 4]
        x = reference.low_rank(rows, cols, rank=1 + seed % 8, seed=seed).float()
        for method in ITERATIVE:
            chosen = settings(coefficients="tight", steps=steps, method=method, dtype="bfloat16")
            assert torch.linalg.svdvals(orthogonalize(x, **chosen).float())[0] < bound


def test_one_step_less_misses_the_bound():
    exact = reference.matrix(96, 256, "1/k")
    factor = polar_factor(exact, steps=4, coefficients="polar_express")
    assert reference.relative_error(factor, reference.polar_factor(exact)) > 0.14


@pytest.mark.parametrize("steps", [5, 8])
def test_gram_equals_newton_schulz_up_to_rounding(steps):
    x = reference.matrix(40, 100, "1/k").float()
    chosen = settings(coefficients="polar_express", steps=steps)
    direct = orthogonalize(x, **chosen)
    # float32 rounds at 6e-8 and forming XXᵀ squares the spread of the singular values (40 here).
    assert reference.relative_error(orthogonalize(x, **chosen | {"method": "gram"}), direct) < 1e-4
    other = orthogonalize(x, **chosen | {"method": "gram", "coefficients": "quintic"})
    assert reference.relative_error(other, direct) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "steps"), [("quintic", 10), ("polar_express", 8)])
def test_gram_stays_bounded_on_rank_deficient_input_however_many_steps(name, steps, dtype):
    x = reference.low_rank(64, 96, rank=6).float()
    chosen = settings(method="gram", coefficients=name, steps=steps, dtype=dtype)
    # The null space holds rounding noise that the iteration lifts towards one, no further: 1.2 is
    # the quintic's largest value, and bfloat16 adds some per cent.
    assert torch.linalg.svdvals(orthogonalize(x, **chosen).float())[0] < 1.3


@pytest.mark.parametrize("name", ["quintic", "polar_express", "tight"])
def test_gram_in_bfloat16_stays_bounded_on_many_small_rank_deficient_matrices(name):
    for seed in range(60):
        x = reference.low_rank(9, 16, rank=1 + seed % 8, seed=seed).float()
        factor = orthogonalize(x, **settings(method="gram", coefficients=name, dtype="bfloat16"))
        assert torch.linalg.svdvals(factor.float())[0] < 1.3


def test_gram_without_restarts_diverges_on_the_same_input(monkeypatch):
    monkeypatch.setattr("hf_muon.polar.gram.FIRST_RUN", 8)
    x = reference.low_rank(64, 96, rank=6).float()
    chosen = settings(method="gram", coefficients="polar_express", steps=8, dtype="bfloat16")
    factor = orthogonalize(x, **chosen).float()
    assert not factor.isfinite().all() or torch.linalg.svdvals(factor)[0] > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 20, 33), (33, 20), (1, 9), (9, 1)])
def test_svd_agrees_with_the_definition(shape, dtype):
    exact = torch.stack([reference.matrix(*shape[-2:], seed=i) for i in range(3)])[: shape[0]]
    exact = exact if len(shape) == 3 else exact[0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13  # ε times the condition of these matrices
    factor = polar_factor(exact.to(dtype), method="svd")
    oracle = reference.polar_factor(exact)
    assert reference.relative_error(factor, oracle) < tolerance
    assert reference.relative_error(-factor, oracle) > 1


def test_svd_maps_the_null_space_to_zero():
    x = reference.low_rank(12, 20, rank=4)
    values = torch.linalg.svdvals(polar_factor(x, method="svd"))
    assert values[:4].tolist() == pytest.approx([1.0] * 4)
    assert values[4:].max() < 1e-12  # rounding of a float64 product


# --- agreement with torch.optim.Muon --------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(64, 64), (48, 120), (1, 70), (33, 65)])
def test_quintic_in_bfloat16_is_torchs_iteration_bit_for_bit(shape, size):
    x = (reference.matrix(*shape) * size).float()
    theirs = _zeropower_via_newtonschulz(x.clone(), QUINTIC, 5, 1e-7)
    chosen = settings(dtype="bfloat16")
    assert torch.equal(orthogonalize(x, **chosen), theirs)
    if shape[0] > 1:  # a row has one singular value, whose path ends in the same place
        nudged = _zeropower_via_newtonschulz(x, (3.45, *QUINTIC[1:]), 5, 1e-7)
        assert not torch.equal(orthogonalize(x, **chosen), nudged)


@pytest.mark.parametrize("shape", [(120, 48), (70, 1)])
def test_tall_agrees_with_torch_to_one_rounding_of_bfloat16(shape):
    x = reference.matrix(*shape).float()
    theirs = _zeropower_via_newtonschulz(x.clone(), QUINTIC, 5, 1e-7)
    # Ours is contiguous, theirs a transposed view: the kernels may sum in another order.
    assert reference.relative_error(orthogonalize(x, **settings(dtype="bfloat16")), theirs) <= 2**-8
    assert (
        reference.relative_error(orthogonalize(x, **settings(dtype="bfloat16", steps=4)), theirs)
        > 2**-8
    )


# --- zero, scale, rank ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("method", METHODS)
def test_zero_stays_zero_beside_matrices_that_are_not(method, dtype):
    x = torch.stack([reference.matrix(8, 20, seed=i) for i in range(3)])
    x[1] = 0
    factor = polar_factor(x, method=method, dtype=dtype)
    assert torch.count_nonzero(factor[1]) == 0
    assert torch.count_nonzero(factor[0]) == torch.count_nonzero(factor[2]) == 160
    assert torch.count_nonzero(polar_factor(x[1], method=method, dtype=dtype)) == 0


@pytest.mark.parametrize("method", METHODS)
def test_powers_of_two_change_no_bit_while_largest_entries_stay_ordinary(method):
    x = reference.matrix(12, 30).float()
    factor = polar_factor(x, method=method)
    for exponent in (-30, -1, 20):
        assert torch.equal(polar_factor(x * 2.0**exponent, method=method), factor)
    assert not torch.equal(polar_factor(x + 1e-3, method=method), factor)


@pytest.mark.parametrize("method", METHODS)
def test_subnormal_and_largest_entries_give_finite_factors(method):
    for value in (1e-45, 1e-39, 3.4e38):
        factor = polar_factor(torch.full((5, 7), value), method=method)
        # All entries equal: rank one, with the factor 1/√35 in every place. Coefficients leave at
        # most 0.31 of it.
        assert factor.isfinite().all()
        assert reference.relative_error(factor, torch.full((5, 7), 35**-0.5)) < 0.31


def test_scaling_covers_the_range_of_float64():
    x = reference.matrix(9, 14)
    factor = polar_factor(x, dtype="float32")
    for size in (1e-300, 1e300):
        # The iteration runs in float32 on inputs that rounding tells apart.
        assert reference.relative_error(polar_factor(x * size, dtype="float32"), factor) < 1e-5


def test_bfloat16_input_keeps_its_range():
    x = reference.matrix(9, 14).bfloat16()
    for exponent in (-100, 100):
        assert torch.equal(polar_factor(x * 2.0**exponent), polar_factor(x))


# --- shapes, strides, dtypes ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_tall_and_wide_are_transposes_of_each_other_exactly(method, dtype):
    x = torch.stack([reference.matrix(10, 24, seed=i).float() for i in range(2)])
    wide, tall = (polar_factor(y, method=method, dtype=dtype) for y in (x, x.mT))
    assert torch.equal(tall, wide.mT)
    assert torch.equal(polar_factor(x.mT.contiguous(), method=method, dtype=dtype), wide.mT)
    assert not torch.equal(polar_factor(x.flip(-1).mT, method=method, dtype=dtype), wide.mT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 3, 16, 40), (5, 24, 24), (4, 48, 16), (1, 8, 9)])
def test_a_batch_equals_its_matrices_one_by_one(shape, method):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    factor = polar_factor(x, method=method, dtype="float32")
    assert factor.shape == shape
    for one, expected in zip(x.flatten(0, -3), factor.flatten(0, -3), strict=True):
        assert torch.equal(polar_factor(one, method=method, dtype="float32"), expected)
        assert not torch.equal(polar_factor(one + 0.1, method=method, dtype="float32"), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 3, 6, 17), (4, 30, 7), (3, 1, 5)])
def test_a_batch_of_small_matrices_agrees_to_rounding(shape, method):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    factor = polar_factor(x, method=method, dtype="float32")
    for one, expected in zip(x.flatten(0, -3), factor.flatten(0, -3), strict=True):
        # Batched products this small take another kernel; float32 rounds at 6e-8 and the iteration
        # enlarges it by up to the condition, about 100 here.
        alone = polar_factor(one, method=method, dtype="float32")
        assert reference.relative_error(alone, expected) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 0, 0)])
def test_empty_matrices_come_back_empty(shape, method):
    assert polar_factor(torch.empty(shape), method=method).shape == shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_the_input_untouched(given, method):
    x = reference.matrix(8, 12).to(given).requires_grad_()
    before = x.detach().clone()
    factor = polar_factor(x, method=method)
    assert factor.dtype == given
    assert not factor.requires_grad
    assert torch.equal(x, before)
    assert factor.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("requested", ["float32", "bfloat16", "float64", torch.float64])
def test_orthogonalize_returns_the_compute_dtype(requested):
    factor = orthogonalize(torch.randn(4, 6), **settings(dtype=requested))
    assert factor.dtype == (getattr(torch, requested) if isinstance(requested, str) else requested)


@pytest.mark.parametrize(
    ("given", "requested", "computed"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, "bfloat16", torch.float32),
        (torch.float32, "float16", torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float64, "auto", torch.float64),
        (torch.float64, "float32", torch.float32),
        (torch.float32, "float64", torch.float64),
    ],
)
def test_svd_computes_in_single_precision_or_better(given, requested, computed):
    x = torch.randn(4, 6).to(given)
    assert orthogonalize(x, **settings(method="svd", dtype=requested)).dtype == computed


def test_autocast_does_not_reach_inside():
    x = reference.matrix(16, 24).float()
    outside = polar_factor(x, dtype="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(polar_factor(x, dtype="float32"), outside)
        assert not torch.equal((x @ x.mT).float(), x.double() @ x.double().mT)


def test_meta_tensors_pass_through():
    x = torch.empty(3, 9, 4, device="meta", dtype=torch.bfloat16)
    assert polar_factor(x).shape == x.shape


# --- choice of method -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "steps", "expected"),
    [
        ((512, 512), 5, "newton_schulz"),
        ((768, 1024), 5, "newton_schulz"),
        ((512, 1376), 5, "gram"),
        ((2048, 768), 5, "gram"),
        ((4, 100, 10), 5, "gram"),
        ((10, 100), 1, "newton_schulz"),
    ],
)
def test_auto_takes_the_iteration_with_fewer_operations(shape, steps, expected):
    for dtype in (torch.float32, torch.bfloat16):
        assert cheapest_iteration(shape, steps, dtype) == expected
    if steps == 5:
        x = torch.randn(*shape[:-2], shape[-2] // 4, shape[-1] // 4)
        named = polar_factor(x, method=expected)
        assert torch.equal(polar_factor(x), named)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ([[1.0]], "list"),
        (torch.ones(2, 2, dtype=torch.int64), "int64"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, 2).to_sparse(), "to_dense"),
    ],
)
def test_what_is_not_a_real_dense_matrix_is_refused(x, said):
    with pytest.raises(TypeError, match=said):
        polar_factor(x)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(3)])
def test_fewer_than_two_dimensions_are_refused(x):
    with pytest.raises(ValueError, match="two dimensions"):
        polar_factor(x)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"method": "newton_shulz"}, ValueError, "Did you mean 'newton_schulz'"),
        ({"method": "gramm"}, ValueError, "Did you mean 'gram'"),
        ({"method": None}, TypeError, "NoneType"),
        ({"coefficients": "polarexpress"}, ValueError, "Did you mean 'polar_express'"),
        ({"coefficients": QUINTIC}, TypeError, "tuple"),
        ({"steps": 2}, ValueError, "3 to 8 steps"),
        ({"steps": 5.0}, TypeError, "float"),
        ({"steps": True}, TypeError, "bool"),
        ({"dtype": "bf16"}, ValueError, "Did you mean 'bfloat16'"),
        ({"dtype": torch.int8}, ValueError, "int8"),
        ({"dtype": 32}, TypeError, "int"),
        ({"dtype": "float16"}, ValueError, "slower"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(changes, error, said):
    with pytest.raises(error, match=said) as caught:
        polar_factor(torch.randn(3, 4), **changes)
    assert next(iter(changes)) in str(caught.value)


def test_names_match_the_tables():
    assert set(FAMILIES) == {"quintic", "polar_express", "tight"}
    assert METHODS == ("auto", "newton_schulz", "gram", "svd")
