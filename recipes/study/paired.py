"""Statistics of losses over seeds: mean, errors, paired differences, and whether a target is met.

In: losses by seed, infinite if a run diverged. Out: numbers with their standard errors, and
verdicts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FEWEST = 3
"""Seeds below which a difference says nothing: the error of two pairs is too uncertain."""
SURE = 3.09
"""Standard errors of a one-sided test at one in a thousand, for a normal distribution."""

Losses = Mapping[int, float]


class Estimate(NamedTuple):
    """A mean with its standard error, which is None for a single value."""

    mean: float
    error: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return mean and standard error; None if there is no value or one is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for a single value) and the values."""
    measurable = len(values) > 1 and all(map(math.isfinite, values))
    spread = statistics.stdev(values) if measurable else None
    return {"mean": statistics.fmean(values), "spread": spread, "values": list(values)}


def difference(losses: Losses, others: Losses) -> Estimate | None:
    """Return the mean paired difference over common seeds, with its standard error."""
    both = sorted(losses.keys() & others.keys())
    return estimate([losses[seed] - others[seed] for seed in both])


def verdict(found: Estimate) -> str:
    """Say what a difference means, decided at two standard errors; lower loss is better."""
    if found.error is None or found.count < FEWEST:
        return f"fewer than {FEWEST} pairs"
    if abs(found.mean) <= 2 * found.error:
        return "not told apart"
    return "better" if found.mean < 0 else "worse"


def certainty(losses: Losses, target: float) -> float | None:
    """Return how many standard errors the mean is below a target: (target − mean)·√n/σ.

    The target is met at ``SURE`` or above. None if there are fewer than ``FEWEST`` seeds, or a run
    diverged.
    """
    found = estimate(list(losses.values()))
    if found is None or found.count < FEWEST or not found.error:
        return None
    return (target - found.mean) / found.error
