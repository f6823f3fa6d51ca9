"""Coefficients: against published numbers, the property that defines them, and the user's own."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from hf_muon.polar import FAMILIES, check_steps, polar_factor, register_coefficients
from hf_muon.polar.coefficients import QUINTIC, coefficients
from scripts import coefficients as script

# Amsel, Persson, Musco and Gower, arXiv 2505.16932, implementation 1: the triples before the safety
# factor, for l = 1e-3 and the authors' cushion.
PUBLISHED = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# The cushion is published to 7 digits, and the triples depend on it about as strongly.
TABLE_TOLERANCE = 5e-8


def apply(triples, x):
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.fixture
def registry():
    """The families, as they were again after the test."""
    before = dict(FAMILIES)
    yield FAMILIES
    FAMILIES.clear()
    FAMILIES.update(before)
    coefficients.cache_clear()


def test_the_tables_are_those_of_their_derivation(capsys):
    assert FAMILIES["polar_express"].rows == (script.polar_express(),)
    assert FAMILIES["tight"].rows == tuple(script.tight(steps) for steps in range(3, 9))
    for steps in range(3, 9):
        raw = script.greedy_composition(steps)
        assert raw == script.polar_express()[:steps]
        assert coefficients("polar_express", steps)[-1] == raw[-1]
    script.main()
    assert repr(FAMILIES["tight"].rows) in capsys.readouterr().out


def test_polar_express_matches_the_published_table_before_safety():
    [computed] = torch.tensor(FAMILIES["polar_express"].rows, dtype=torch.float64)
    published = torch.tensor(PUBLISHED, dtype=torch.float64)
    torch.testing.assert_close(computed, published, rtol=TABLE_TOLERANCE, atol=0)


def test_the_table_is_told_apart_from_one_with_another_cushion(monkeypatch):
    monkeypatch.setattr(script, "CUSHION", 0.024)
    assert abs(script.polar_express()[0][0] / PUBLISHED[0][0] - 1) > 1e3 * TABLE_TOLERANCE


def test_safety_applies_to_every_step_but_the_last():
    table = coefficients("polar_express", 5)
    for (a, b, c), (pa, pb, pc) in zip(table[:-1], PUBLISHED[:4], strict=True):
        expected = (pa / 1.01, pb / 1.01**3, pc / 1.01**5)
        assert (a, b, c) == pytest.approx(expected, rel=TABLE_TOLERANCE)
    assert table[-1] == pytest.approx(PUBLISHED[4], rel=TABLE_TOLERANCE)
    assert table[0][0] == pytest.approx(8.2052, abs=5e-5)  # the figure as quoted, four decimals


def test_gram_in_half_precision_gets_more_safety_on_every_step():
    for (a, b, c), (pa, pb, pc) in zip(
        coefficients("polar_express", 5, half_gram=True), PUBLISHED[:5], strict=True
    ):
        expected = (pa / 1.05, pb / 1.05**3, pc / 1.05**5)
        assert (a, b, c) == pytest.approx(expected, rel=TABLE_TOLERANCE)
    assert coefficients("quintic", 5, half_gram=True) == coefficients("quintic", 5)


@pytest.mark.parametrize(("low", "high"), [(0.02407327, 1.0), (0.1, 1.9), (0.5, 1.5), (0.9, 1.1)])
def test_best_quintic_alternates_and_beats_its_neighbors(low, high):
    x = torch.linspace(low, high, 20001, dtype=torch.float64)
    triple = script.best_quintic(low, high)
    deviation = apply([triple], x) - 1
    size = deviation.abs().max().item()
    # Four alternating extrema of equal size characterise the best odd quintic (Chebyshev). The grid
    # misses an interior extremum by the square of its spacing.
    assert deviation[0].item() == pytest.approx(-size, rel=1e-6)
    assert deviation[-1].item() == pytest.approx(size, rel=1e-6)
    inner = deviation[1:-1]
    assert inner.max().item() == pytest.approx(size, rel=1e-4)
    assert inner[inner.argmax() :].min().item() == pytest.approx(-size, rel=1e-4)
    for i in range(3):
        for factor in (0.999, 1.001):
            other = [t * factor if j == i else t for j, t in enumerate(triple)]
            assert (apply([other], x) - 1).abs().max().item() > size


def test_best_quintic_of_a_point_is_the_taylor_one():
    assert script.best_quintic(2.0, 2.0) == (15 / 16, -10 / 64, 3 / 256)


@pytest.mark.parametrize("steps", range(3, 9))
def test_polar_express_moves_its_interval_towards_one(steps):
    x = torch.logspace(-3, 0, 4001, dtype=torch.float64)
    worst = [
        (apply(coefficients("polar_express", k), x) - 1).abs().max() for k in range(3, steps + 1)
    ]
    assert worst[0] < 1  # three steps end in (0, 2)
    assert all(later < earlier for earlier, later in pairwise(worst))


@pytest.mark.parametrize("steps", range(3, 9))
def test_tight_is_composed_for_twice_the_range_with_each_step(steps):
    lowest = 3e-3 * 2.0 ** (4 - steps)
    raw = FAMILIES["tight"].rows[steps - 3]
    x = torch.logspace(-5, 0, 20001, dtype=torch.float64)
    deviation = (apply(raw, x) - 1).abs()
    inside = x >= lowest
    # Equal deviations of both signs mark the best composition: the largest is that at the lower
    # end, up to the rounding of eight steps, and below that end it grows.
    largest = (1 - apply(raw, lowest)) * (1 + 1e-3) + 1e-9
    assert deviation[inside].max() <= largest
    assert deviation[~inside].min() >= 0.99 * largest - 2e-9
    assert coefficients("tight", steps)[-1] == raw[-1]
    assert coefficients("tight", steps)[0][0] == pytest.approx(raw[0][0] / 1.01)


def test_four_tight_steps_amplify_less_than_five_of_polar_express():
    def slope(triples):
        return math.prod(a for a, _, _ in triples)

    assert slope(coefficients("tight", 4)) < slope(coefficients("polar_express", 5)) / 2


def test_quintic_repeats_jordans_triple_for_any_number_of_steps():
    assert coefficients("quintic", 1) == ((3.4445, -4.7750, 2.0315),)
    assert len(coefficients("quintic", 17)) == 17


def test_the_quintic_ends_where_it_is_said_to():
    x = torch.logspace(-4, 0, 40001, dtype=torch.float64)
    ends = apply(coefficients("quintic", 5), x)
    reached = ends[x >= 0.00151]
    assert reached.min() == pytest.approx(0.6818, abs=1e-4)
    assert reached.max() == pytest.approx(1.2024, abs=1e-4)
    assert ends[x >= 0.0055].max() == pytest.approx(1.1344, abs=1e-4)


def test_tables_are_deterministic_and_hashable():
    for name in FAMILIES:
        assert hash(coefficients(name, 5)) == hash(coefficients(name, 5))
    assert coefficients("polar_express", 5) is coefficients("polar_express", 5)


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [
        ("polar_express", 2, "3 to 8 steps"),
        ("polar_express", 9, "3 to 8 steps are allowed; 'quintic' takes 1 to 99"),
        ("tight", 2, "coefficients='tight': 3 to 8 steps"),
        ("quintic", 0, "1 to 99 steps are allowed.$"),
        ("quintic", 100, "1 to 99"),
        ("cubic", 5, "polar_express"),
    ],
)
def test_what_is_not_in_the_tables_is_refused(name, steps, said):
    with pytest.raises(ValueError, match=said):
        coefficients(name, steps)
    with pytest.raises(ValueError, match=said) as caught:
        check_steps(name, steps, "polar_steps")
    assert name == "cubic" or f"polar_steps={steps}" in str(caught.value)


# --- the user's own -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 12), (8, 40)])
def test_registered_triples_are_used_as_they_are(shape, registry):
    theirs = coefficients("polar_express", 6)
    register_coefficients("mine", [list(triple) for triple in theirs])
    register_coefficients("tightly", FAMILIES["tight"].rows[1], start="schatten")
    x = torch.randn(shape, dtype=torch.float64)
    factor = polar_factor(x, coefficients="mine", steps=6, dtype="float64")
    ours = {"coefficients": "polar_express", "steps": 6, "dtype": "float64"}
    assert torch.equal(factor, polar_factor(x, **ours))
    assert coefficients("mine", 6) == theirs
    # For gram in half precision what an input 5 % larger needs, as with our own.
    half = zip(coefficients("mine", 6, half_gram=True), theirs, strict=True)
    assert all(a == p / 1.05 and c == r / 1.05**5 for (a, _, c), (p, _, r) in half)
    # Its start is its own: another one gives another factor.
    tight = polar_factor(x, coefficients="tightly", steps=4)
    register_coefficients("loosely", FAMILIES["tight"].rows[1])
    assert not torch.equal(tight, polar_factor(x, coefficients="loosely", steps=4))


def test_fewer_steps_than_were_given_are_allowed_from_where_they_end_near_one_on(registry):
    register_coefficients("mine", coefficients("polar_express", 6))
    for steps in (5, 6):
        check_steps("mine", steps)
    for steps in (4, 7):
        with pytest.raises(ValueError, match=rf"steps={steps} .*'mine': 5 to 6 steps"):
            polar_factor(torch.eye(3), coefficients="mine", steps=steps)


def test_a_name_stands_for_one_family(registry):
    register_coefficients("mine", [QUINTIC] * 5)
    register_coefficients("mine", [QUINTIC] * 5)
    for name, start in [("quintic", "frobenius"), ("mine", "schatten")]:
        with pytest.raises(ValueError, match=f"'{name}' exist with other triples"):
            register_coefficients(name, [QUINTIC] * 5, start=start)
    assert FAMILIES["mine"].start == "frobenius"


@pytest.mark.parametrize(
    ("name", "triples", "start", "error", "said"),
    [
        ("mine", [], "frobenius", ValueError, "are none"),
        ("mine", [(2.0, 1.0)], "frobenius", TypeError, "three numbers"),
        ("mine", [(2.0, "b", 1.0)], "frobenius", TypeError, "three numbers"),
        ("mine", 3, "frobenius", TypeError, "three numbers"),
        ("mine", [QUINTIC, (math.nan, 1.0, 1.0)], "frobenius", ValueError, "value 1 to nan"),
        ("mine", [(1e200, 1.0, 1e300)] * 3, "frobenius", ValueError, r"value 1 to .*\(0, 1.5\]"),
        ("mine", [(2.0, 0.0, 0.0)], "frobenius", ValueError, "value 1 to 2; .*first step first"),
        ("mine", [(-1.5, 0.5, 0.0)], "frobenius", ValueError, "value 1 to -1"),
        ("mine", [QUINTIC], "spectral", ValueError, "schatten"),
        ("my own", [QUINTIC], "frobenius", ValueError, "letters"),
        (None, [QUINTIC], "frobenius", ValueError, "letters"),
    ],
)
def test_triples_that_lead_nowhere_are_refused(name, triples, start, error, said, registry):
    with pytest.raises(error, match=said):
        register_coefficients(name, triples, start=start)
    assert name not in registry
