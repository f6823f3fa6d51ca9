"""What one sample says: the metrics' own numbers, and nothing where nothing can be said."""

import math

import torch

from hf_muon import diagnostics as d
from hf_muon.diagnostics.spectra import StepMatrices, measure, turned
from hf_muon.polar import polar_factor

M, N, BETA = 24, 16, 0.9


def matrices(**given):
    torch.manual_seed(0)
    G, average, weight, update = (torch.randn(M, N) for _ in range(4))
    drawn = {"gradient": G, "average": average, "weight": weight, "update": update}
    factor = polar_factor(average, steps=3, dtype="float32")
    return StepMatrices(**{**drawn, "factored": average, "factor": factor, **given})


def test_values_are_those_of_the_metrics():
    at = matrices()
    values, leading = measure(7, at, BETA, 3)
    sigma = torch.linalg.svdvals(at.average)
    rank = max(1, int((sigma > values["noise_edge"]).sum()))
    error = d.orthogonality_error(at.factor, at.factored)
    expected = {
        "gap": d.spectral_gap(at.average, rank),
        "filtering_ratio_3": d.filtering_ratio(at.average, at.gradient)[2],
        "gradient_nuclear_rank": d.nuclear_rank(at.gradient),
        "gradient_stable_rank": d.stable_rank(at.gradient),
        "weight_stable_rank": d.stable_rank(at.weight),
        "update_entropy": d.spectral_entropy(at.update),
        "orthogonality_error": error.relative,
        "factor_smallest": error.smallest,
        "factor_largest": error.largest,
        "update_rms": at.update.square().mean().sqrt(),
    }
    for name, value in expected.items():
        assert math.isclose(values[name], value.item(), rel_tol=1e-5), name
    assert leading.step == 7
    assert leading.shape == (M, N)


def test_angles_between_samples_are_those_of_the_metric():
    first, second = matrices(), matrices(average=torch.randn(M, N))
    before, now = (measure(0, at, BETA, 1)[1] for at in (first, second))
    r = min(before.left.shape[1], now.left.shape[1])
    angles = d.principal_angles(first.average, second.average, r)
    found = turned(before, now)
    assert math.isclose(found["sin_left"], angles.sin_left.item(), rel_tol=1e-4)
    assert math.isclose(found["sin_right"], angles.sin_right.item(), rel_tol=1e-4)
    assert turned(now, now)["sin_left"] < 1e-5


def test_what_is_not_defined_is_left_out():
    zero = torch.zeros(M, N)
    values, leading = measure(
        0, matrices(gradient=zero, average=zero, update=zero, factored=zero, factor=zero), BETA, 2
    )
    assert all(math.isfinite(value) for value in values.values())
    absent = {"filtering_ratio_1", "noise_suppression", "noise_edge", "visible_rank"}
    assert not absent & values.keys()
    assert "update_stable_rank" not in values
    assert values["update_rms"] == 0
    assert leading.strengths == []
    assert "orthogonality_error" not in measure(0, matrices(factor=None), BETA, 2)[0]


def test_a_weight_that_is_not_finite_has_a_size_that_says_so():
    values, _ = measure(0, matrices(weight=torch.full((M, N), math.inf)), BETA, 2)
    assert values["weight_rms"] == math.inf
    assert "weight_entropy" not in values


def test_more_singular_values_than_there_are_is_no_error():
    values, _ = measure(0, matrices(), BETA, 100)
    assert f"average_sigma_{N}" in values
    assert f"average_sigma_{N + 1}" not in values


def test_inputs_are_left_as_they_were():
    at = matrices()
    before = [x.clone() for x in vars(at).values()]
    measure(0, at, BETA, 2)
    assert all(torch.equal(x, y) for x, y in zip(vars(at).values(), before, strict=True))
