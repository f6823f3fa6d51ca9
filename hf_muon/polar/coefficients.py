"""Coefficients of the odd quintics that drive singular values to one.

In: the name of a family and a number of steps.
Out: one triple (a, b, c) per step, for p(x) = a·x + b·x³ + c·x⁵ applied to every singular value.
``quintic`` repeats one published triple; ``polar_express`` is computed here from its definition,
in plain Python floats, and is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import sqrt

Triple = tuple[float, float, float]

# Keller Jordan, https://kellerjordan.github.io/posts/muon/, and torch.optim.Muon: the steepest
# slope at zero for which the composition still stays near one. It does not converge: singular
# values end in [0.68, 1.13].
QUINTIC: Triple = (3.4445, -4.7750, 2.0315)

# Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932, section 3.
LOWEST_SINGULAR_VALUE = 1e-3
"""The composition is optimal on [1e-3, 1]; smaller singular values grow but stop short of one."""
CUSHION = 0.02407327
"""No step is fitted to more than [0.024·u, u], which keeps it tame in low precision."""
SAFETY = 1.01
"""Every step but the last expects an input 1 % too large, so that rounding cannot push it out."""
HALF_GRAM_SAFETY = 1.05
"""Safety of every step for the ``gram`` method in half precision, where whole products of steps are
rounded: at 1.01 some rank-deficient matrices diverge there. Costs up to 0.03 of accuracy."""
TIGHT_LOWEST = 3e-3
"""The lower end for four steps of ``tight``, which then come as close as five of the quintic on the
momentum of trained models, and closer on Gaussian matrices (docs/polar.md)."""
COMPOSED_STEPS = range(3, 9)
"""Fewer steps do not reach one, more change nothing: the ninth triple would repeat the eighth."""

# Below this relative width of the interval the alternation system is singular to rounding and the
# best quintic equals the Taylor one to the same accuracy.
_NARROW = 5e-6
# Remez' exchange converges quadratically; these intervals settle in fewer than ten.
_EXCHANGES = 20


def coefficients(name: str, steps: int, *, half_gram: bool = False) -> tuple[Triple, ...]:
    """Return the triples (a, b, c) of ``steps`` iterations, in the order they are applied.

    Args:
        name: ``"quintic"`` or ``"polar_express"`` (the keys of ``COEFFICIENTS``).
        steps: number of iterations; at least 1 for ``quintic``, 3 to 8 for ``polar_express``.
        half_gram: ask for the table that the ``gram`` method needs in half precision.

    Returns:
        A tuple of ``steps`` triples.

    Raises:
        ValueError: the name is unknown or the family has no table of that length.
    """
    if name not in COEFFICIENTS:
        raise ValueError(f"coefficients={name!r} is unknown; choose one of {sorted(COEFFICIENTS)}.")
    return COEFFICIENTS[name](steps, half_gram)


def quintic(steps: int, half_gram: bool = False) -> tuple[Triple, ...]:
    """Repeat Jordan's triple; any number of steps from one up. It has slack enough for ``gram``."""
    if steps < 1:
        raise ValueError(f"steps={steps} with coefficients='quintic': at least 1 step is needed.")
    return (QUINTIC,) * steps


@cache
def polar_express(steps: int, half_gram: bool = False) -> tuple[Triple, ...]:
    """Compose greedily: each step is the best quintic on the interval the last one left behind.

    References: arXiv 2505.16932, algorithm 1 and appendix on finite precision.
    """
    return _composed("polar_express", steps, LOWEST_SINGULAR_VALUE, half_gram)


@cache
def tight(steps: int, half_gram: bool = False) -> tuple[Triple, ...]:
    """Compose like ``polar_express``, for matrices that are scaled by their Schatten 4-norm.

    That norm is closer to the largest singular value than Frobenius', so that the others begin
    higher, and fewer steps take them to one. Each step more doubles the range that is composed for.
    """
    return _composed("tight", steps, TIGHT_LOWEST * 2.0 ** (4 - steps), half_gram)


def _composed(name: str, steps: int, lowest: float, half_gram: bool) -> tuple[Triple, ...]:
    """Return a composition on [lowest, 1] with its safety.

    The safety factor s replaces p(x) by p(x/s), that is (a/s, b/s³, c/s⁵): 1.01 on all steps but
    the last, or 1.05 on every step with ``half_gram``.
    """
    if steps not in COMPOSED_STEPS:
        raise ValueError(
            f"steps={steps} with coefficients={name!r}: between {COMPOSED_STEPS[0]} and "
            f"{COMPOSED_STEPS[-1]} steps are allowed."
        )
    raw = greedy_composition(steps, lowest)
    if half_gram:
        return tuple(_with_safety(triple, HALF_GRAM_SAFETY) for triple in raw)
    return (*(_with_safety(triple, SAFETY) for triple in raw[:-1]), raw[-1])


def _with_safety(triple: Triple, s: float) -> Triple:
    a, b, c = triple
    return a / s, b / s**3, c / s**5


def greedy_composition(steps: int, lowest: float = LOWEST_SINGULAR_VALUE) -> tuple[Triple, ...]:
    """Return the ``steps`` triples of Polar Express on [lowest, 1], before the safety factor."""
    low, high = lowest, 1.0
    triples: list[Triple] = []
    for _ in range(steps):
        a, b, c = best_quintic(max(low, CUSHION * high), high)
        # A cushioned fit is centred on one over the wrong interval: recentre it over [low, high],
        # so that its smallest and largest values lie at equal distance from one.
        centre = 2 / (_evaluate((a, b, c), low) + _evaluate((a, b, c), high))
        triple = (a * centre, b * centre, c * centre)
        triples.append(triple)
        low = _evaluate(triple, low)
        high = 2 - low
    return tuple(triples)


def best_quintic(low: float, high: float) -> Triple:
    """Return the odd quintic closest to one on [low, high] in the largest deviation.

    The optimum equals 1 − E, 1 + E, 1 − E, 1 + E at low, two interior extrema and high. Remez'
    exchange finds the extrema: fit the four values, move to the extrema of the fit, repeat.

    Args:
        low: smallest singular value, 0 < low <= high.
        high: largest singular value.

    Returns:
        The triple (a, b, c).
    """
    if low >= (1 - _NARROW) * high:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    points = (low, (3 * low + high) / 4, (low + 3 * high) / 4, high)
    for _ in range(_EXCHANGES):
        a, b, c = _alternating_fit(points)
        # p'(x) = a + 3b·x² + 5c·x⁴ vanishes at the two interior extrema.
        root = sqrt(9 * b * b - 20 * a * c)
        points = (low, sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c)), high)
    return a, b, c


def _alternating_fit(points: tuple[float, ...]) -> Triple:
    """Solve p(x_i) = 1 ∓ E at four points for the triple; E falls out on the way.

    With t = x², p(x)/x is a parabola in t, so the third divided difference of (1 ∓ E)/x vanishes:
    that gives E, and Newton's form through the first three points gives the parabola.
    """
    t = [x * x for x in points]
    ones = _divided_differences(t, [1 / x for x in points])[3]
    signs = _divided_differences(t, [s / x for s, x in zip((-1, 1, -1, 1), points, strict=True)])[3]
    error = -ones / signs
    values = [(1 + s * error) / x for s, x in zip((-1, 1, -1), points[:3], strict=True)]
    d0, d1, d2 = _divided_differences(t[:3], values)
    a = d0 - d1 * t[0] + d2 * t[0] * t[1]
    return a, d1 - d2 * (t[0] + t[1]), d2


def _divided_differences(t: list[float], values: list[float]) -> list[float]:
    """Return f[t0], f[t0,t1], … : the coefficients of Newton's interpolation."""
    table = list(values)
    for order in range(1, len(t)):
        for i in range(len(t) - 1, order - 1, -1):
            table[i] = (table[i] - table[i - 1]) / (t[i] - t[i - order])
    return table


def _evaluate(triple: Triple, x: float) -> float:
    a, b, c = triple
    return a * x + b * x**3 + c * x**5


COEFFICIENTS: dict[str, Callable[[int, bool], tuple[Triple, ...]]] = {
    "quintic": quintic,
    "polar_express": polar_express,
    "tight": tight,
}
"""Families by name."""
