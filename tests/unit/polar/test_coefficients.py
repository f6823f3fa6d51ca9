"""Coefficients: against published numbers and against the property that defines them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from hf_muon.polar.coefficients import (
    COEFFICIENTS,
    best_quintic,
    coefficients,
    greedy_composition,
)

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


def test_polar_express_matches_the_published_table_before_safety():
    computed = torch.tensor(greedy_composition(8), dtype=torch.float64)
    published = torch.tensor(PUBLISHED, dtype=torch.float64)
    torch.testing.assert_close(computed, published, rtol=TABLE_TOLERANCE, atol=0)


def test_the_table_is_told_apart_from_one_with_another_cushion(monkeypatch):
    monkeypatch.setattr("hf_muon.polar.coefficients.CUSHION", 0.024)
    assert abs(greedy_composition(8)[0][0] / PUBLISHED[0][0] - 1) > 1e3 * TABLE_TOLERANCE


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
def test_best_quintic_alternates_and_beats_its_neighbours(low, high):
    x = torch.linspace(low, high, 20001, dtype=torch.float64)
    triple = best_quintic(low, high)
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
    assert best_quintic(2.0, 2.0) == (15 / 16, -10 / 64, 3 / 256)


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
    raw = greedy_composition(steps, lowest)
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


def test_tables_are_deterministic_and_hashable():
    for name in COEFFICIENTS:
        assert hash(coefficients(name, 5)) == hash(coefficients(name, 5))
    assert coefficients("polar_express", 5) is coefficients("polar_express", 5)


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [
        ("polar_express", 2, "between 3 and 8"),
        ("polar_express", 9, "between 3 and 8"),
        ("tight", 2, "coefficients='tight': between 3 and 8"),
        ("quintic", 0, "at least 1"),
        ("cubic", 5, "polar_express"),
    ],
)
def test_what_is_not_in_the_tables_is_refused(name, steps, said):
    with pytest.raises(ValueError, match=said):
        coefficients(name, steps)
