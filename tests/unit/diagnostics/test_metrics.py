"""Metrics: agreement with the float64 definitions, invariances, edge cases and refusals."""

import math

import pytest
import torch

from hf_muon import diagnostics as d
from tests.reference import spectra as reference

SHAPES = ((12, 20), (20, 12), (16, 16), (1, 9))
# float32 has 6e-8; sums over 400 products and the SVD's backward error leave two digits of room.
FP32 = 1e-5


def together(*values):
    """Numbers per matrix, (…, k)."""
    return torch.stack(values, -1)


# name -> metric and definition, functions of (X, S, rank).
METRICS = {
    "signal_alignment": (
        lambda X, S, r: together(d.signal_alignment(X, S)),
        lambda X, S, r: [reference.signal_alignment(X, S)],
    ),
    "signal_alignment of rank r": (
        lambda X, S, r: together(d.signal_alignment(X, S, r)),
        lambda X, S, r: [reference.signal_alignment(X, S, r)],
    ),
    "direction_alignment": (
        lambda X, S, r: together(d.direction_alignment(X, S)),
        lambda X, S, r: [reference.direction_alignment(X, S)],
    ),
    "principal_angles": (
        lambda X, S, r: together(
            d.principal_angles(X, S, r).sin_left, d.principal_angles(X, S, r).sin_right
        ),
        lambda X, S, r: reference.sin_theta(X, S, r),
    ),
    "spectral_gap": (
        lambda X, S, r: together(d.spectral_gap(X, r)),
        lambda X, S, r: [reference.spectral_gap(X, r)],
    ),
    "filtering_ratio": (
        lambda X, S, r: d.filtering_ratio(X, X + S),
        lambda X, S, r: reference.filtering_ratio(X, X + S),
    ),
    "noise_suppression": (
        lambda X, S, r: together(d.noise_suppression(2 * X, X, S)),
        lambda X, S, r: [reference.noise_suppression(2 * X, X, S)],
    ),
    "stable_rank": (
        lambda X, S, r: together(d.stable_rank(X)),
        lambda X, S, r: [reference.stable_rank(X)],
    ),
    "spectral_entropy": (
        lambda X, S, r: together(d.spectral_entropy(X)),
        lambda X, S, r: [reference.spectral_entropy(X)],
    ),
    "effective_rank": (
        lambda X, S, r: together(d.effective_rank(X)),
        lambda X, S, r: [math.exp(reference.spectral_entropy(X))],
    ),
    "orthogonality_error": (
        lambda X, S, r: together(*d.orthogonality_error(S, X)),
        lambda X, S, r: reference.orthogonality_error(S, X),
    ),
}
# What multiplying X by 2 does to a metric where it does not leave it as it is.
DEGREE_IN_X = {"signal_alignment": 1, "spectral_gap": 1}


def pair(m, n, dtype=torch.float32):
    """A matrix and a signal of rank 3 that is part of it."""
    S = torch.randn(m, min(3, m, n)) @ torch.randn(min(3, m, n), n)
    return (S + torch.randn(m, n)).to(dtype), S.to(dtype)


def rotation(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METRICS)
def test_metric_equals_its_float64_definition(name, shape):
    metric, definition = METRICS[name]
    X, S = pair(*shape)
    rank = min(3, *shape)
    # abs: an angle between two spaces that are everything is zero up to rounding.
    expected = pytest.approx(list(definition(X, S, rank)), rel=FP32, abs=FP32)
    assert metric(X, S, rank).tolist() == expected


@pytest.mark.parametrize("name", METRICS)
def test_definitions_tell_matrices_apart(name):
    metric, definition = METRICS[name]
    (X, S), (Y, Z) = pair(12, 20), pair(12, 20)
    assert metric(X, S, 3).tolist() != pytest.approx(list(definition(Y, Z, 3)), rel=1e-3)


@pytest.mark.parametrize("name", METRICS)
def test_a_batch_gives_what_its_matrices_give(name):
    metric, _ = METRICS[name]
    pairs = [pair(8, 12) for _ in range(6)]
    X, S = (torch.stack(part).reshape(2, 3, 8, 12) for part in zip(*pairs, strict=True))
    one_by_one = torch.stack([metric(x, s, 2) for x, s in pairs])
    torch.testing.assert_close(metric(X, S, 2).flatten(0, 1), one_by_one, rtol=FP32, atol=FP32)


def test_one_signal_serves_a_batch_of_updates():
    _, S = pair(8, 12)
    X = torch.randn(5, 8, 12)
    torch.testing.assert_close(d.signal_alignment(X, S), d.signal_alignment(X, S.expand(5, 8, 12)))
    assert d.principal_angles(X, S, 2).left.shape == (5, 2)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_do_not_depend_on_the_basis_or_the_orientation(name):
    metric, _ = METRICS[name]
    X, S = pair(12, 20, torch.float64)
    Q, R = rotation(12), rotation(20)
    value = metric(X, S, 3)
    torch.testing.assert_close(metric(Q @ X @ R, Q @ S @ R, 3), value)
    turned = metric(X.mT, S.mT, 3)
    torch.testing.assert_close(turned.flip(-1) if name == "principal_angles" else turned, value)


SPECTRUM_ALONE = {"spectral_gap", "stable_rank", "spectral_entropy", "effective_rank"}


@pytest.mark.parametrize("name", sorted(set(METRICS) - SPECTRUM_ALONE))
def test_a_rotation_of_one_argument_alone_shows(name):
    metric, _ = METRICS[name]
    X, S = pair(12, 20, torch.float64)
    assert not torch.allclose(metric(rotation(12) @ X, S, 3), metric(X, S, 3), rtol=1e-3)


@pytest.mark.parametrize("scale", [2.0, 1e-12, 1e12])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_scale_as_their_formula_says(name, scale):
    metric, _ = METRICS[name]
    X, S = pair(12, 20, torch.float64)
    value = metric(X, S, 3)
    if name in ("filtering_ratio", "noise_suppression", "orthogonality_error"):
        scaled = metric(scale * X, scale * S, 3)  # the size of both together
        if name == "orthogonality_error":
            scaled = metric(scale * X, S, 3)  # P is compared with O(X), which has no size
    else:
        scaled = metric(scale * X, S, 3)
        value = value * scale ** DEGREE_IN_X.get(name, 0)
    torch.testing.assert_close(scaled, value)


@pytest.mark.parametrize("name", ["signal_alignment", "direction_alignment", "principal_angles"])
def test_the_size_of_the_signal_does_not_matter(name):
    metric, _ = METRICS[name]
    X, S = pair(12, 20, torch.float64)
    torch.testing.assert_close(metric(X, 1e6 * S, 3), metric(X, S, 3))


def test_the_polar_factor_of_the_signal_is_perfectly_aligned():
    _, S = pair(12, 20, torch.float64)
    factor = reference.polar(S, 3)
    assert d.signal_alignment(factor, S).item() == pytest.approx(1)
    assert d.signal_alignment(-factor, S).item() == pytest.approx(-1)
    assert d.signal_alignment(factor / 2, S).item() == pytest.approx(0.5)
    assert d.signal_alignment(S / 7, S, rank=3).item() == pytest.approx(1)
    assert d.direction_alignment(factor, S).item() < 0.999  # S is not flat


def test_rank_one_alignment_is_the_bilinear_form():
    u, v = rotation(12)[:, :1], rotation(20)[:, :1]
    X = torch.randn(12, 20, dtype=torch.float64)
    torch.testing.assert_close(d.signal_alignment(X, 3 * u @ v.T), (u.T @ X @ v).squeeze())


def test_flat_spectra_have_the_largest_entropy():
    flat = rotation(16)
    assert d.stable_rank(flat).item() == pytest.approx(16)
    assert d.effective_rank(flat).item() == pytest.approx(16)
    assert d.spectral_entropy(flat).item() == pytest.approx(math.log(16))
    one = torch.outer(torch.randn(16), torch.randn(9))
    # The other singular values of a float32 outer product are rounding errors, 1e-7 of the first.
    assert d.stable_rank(one).item() == pytest.approx(1, abs=FP32)
    assert d.effective_rank(one).item() == pytest.approx(1, abs=FP32)


def test_the_stable_rank_bounds_the_effective_rank_from_below():
    X = torch.randn(50, 10, 14) * torch.linspace(0, 3, 14)
    assert (d.effective_rank(X) >= d.stable_rank(X)).all()


@pytest.mark.parametrize("angle", [1e-5, 0.3, math.pi / 2 - 1e-5])
def test_small_and_large_angles_are_exact_in_float32(angle):
    """arccos alone would see no angle below 3e-4 in float32, arcsin none that near to π/2."""
    e1, e2 = torch.eye(6)[:, :1], torch.eye(6)[:, 1:2]
    turned = math.cos(angle) * e1 + math.sin(angle) * e2
    v = torch.eye(5)[:, :1]
    angles = d.principal_angles(turned @ v.T, e1 @ v.T)
    assert angles.left.item() == pytest.approx(angle, rel=1e-3)
    assert angles.right.item() == pytest.approx(0, abs=1e-6)


def test_angles_ascend_and_their_number_is_the_rank_of_the_signal():
    X, S = pair(12, 20)
    angles = d.principal_angles(X, S)
    assert angles.left.shape == angles.right.shape == (3,)
    assert (angles.left.diff() >= 0).all()
    assert angles.sin_left == angles.left[-1].sin()


def test_the_gap_of_the_last_singular_value_reaches_to_zero():
    X = torch.randn(4, 7)
    assert d.spectral_gap(X, 4) == torch.linalg.svdvals(X)[-1]


def test_filtering_ratio_ignores_indices_that_are_zero_in_the_gradient():
    _, S = pair(12, 20)
    ratio = d.filtering_ratio(S / 2, S)
    torch.testing.assert_close(ratio[:3], torch.full((3,), 0.5))
    assert ratio[3:].isnan().all()


def test_noise_suppression_without_a_signal_compares_the_matrices():
    X, Y = torch.randn(2, 4, 7)
    torch.testing.assert_close(d.noise_suppression(X, Y), X.norm() / Y.norm())


def test_undefined_numbers_are_nan_and_leave_the_rest_of_a_batch():
    X = torch.stack([torch.zeros(4, 7), torch.randn(4, 7)])
    S = torch.randn(4, 7)
    for value in (
        d.stable_rank(X),
        d.spectral_entropy(X),
        d.effective_rank(X),
        d.direction_alignment(X, S),
        d.signal_alignment(S, X),
        d.noise_suppression(0 * X, X),
    ):
        assert value.isnan().tolist() == [True, False]
    assert d.signal_alignment(X, S)[0] == 0  # no update, no progress
    assert d.signal_alignment(X, S, rank=2)[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METRICS)
def test_half_precision_is_computed_in_float32(name, dtype):
    metric, _ = METRICS[name]
    X, S = (A.to(dtype) for A in pair(8, 12))
    if name in ("filtering_ratio", "noise_suppression"):
        X, S = X.float(), S.float()  # the test's own sums would round
    value = metric(X, S, 2)
    assert value.dtype == torch.float32
    assert torch.equal(value, metric(X.float(), S.float(), 2))


def test_autocast_does_not_reach_the_metrics():
    X, S = pair(12, 20)
    expected = d.principal_angles(X, S, 2), d.signal_alignment(X, S, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = d.principal_angles(X, S, 2), d.signal_alignment(X, S, 2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_metrics_record_no_gradient_and_change_nothing():
    X, S = pair(8, 12)
    before = X.clone()
    X.requires_grad_()
    for metric, _ in METRICS.values():
        assert not metric(X, S, 2).requires_grad
    assert torch.equal(X, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X: d.signal_alignment(X, X[:3]), r"one shape.*\(4, 7\).*\(3, 7\)"),
        (lambda X: d.stable_rank(X[0]), r"A matrix.*\(7,\)"),
        (lambda X: d.stable_rank(X[:, :0]), r"A matrix.*\(4, 0\)"),
        (lambda X: d.spectral_gap(X, 5), r"rank=5.*1 … 4"),
        (lambda X: d.spectral_gap(X, 0), r"rank=0.*1 … 4"),
        (lambda X: d.signal_alignment(X, X, rank=1.5), r"rank=1\.5"),
        (lambda X: d.principal_angles(X, 0 * X), r"ranks \[0\]"),
        (
            lambda X: d.principal_angles(
                torch.stack([X, X]), torch.stack([X, X[:, :1] * torch.ones(7)])
            ),
            r"ranks \[1, 4\]",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 7))


@pytest.mark.parametrize("wrong", [torch.ones(2, 2, dtype=torch.int64), [[1.0]]])
def test_what_is_not_a_real_tensor_is_refused(wrong):
    with pytest.raises(TypeError, match="real floating-point"):
        d.stable_rank(wrong)
