"""Print the triples of ``polar_express`` and ``tight`` in hf_muon/polar/coefficients.py.

In: nothing. Out: Python literals, computed from the definition in Python floats, so that they are
the same on every machine.
"""

from __future__ import annotations

from math import sqrt

Triple = tuple[float, float, float]

# Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932, section 3.
LOWEST_SINGULAR_VALUE = 1e-3
"""The composition is optimal on [1e-3, 1]; smaller singular values grow but stop short of one."""
CUSHION = 0.02407327
"""No step is fitted to more than [0.024·u, u], which keeps it tame in low precision."""
TIGHT_LOWEST = 3e-3
"""The lower end for four steps of ``tight``, which then come as close as five of the quintic on the
momentum of trained models, and closer on Gaussian matrices (docs/polar.md)."""
STEPS = range(3, 9)
"""Fewer steps do not reach one, more change nothing: the ninth triple would repeat the eighth."""

# Below this relative width of the interval the alternation system is singular to rounding and the
# best quintic equals the Taylor one to the same accuracy.
_NARROW = 5e-6
# Remez' exchange converges quadratically; these intervals settle in fewer than ten.
_EXCHANGES = 20


def polar_express() -> tuple[Triple, ...]:
    """Return the triples of the longest composition; shorter ones are its first triples."""
    return greedy_composition(STEPS[-1])


def tight(steps: int) -> tuple[Triple, ...]:
    """Return a composition whose lower end is halved with each further step."""
    return greedy_composition(steps, TIGHT_LOWEST * 2.0 ** (4 - steps))


def greedy_composition(steps: int, lowest: float = LOWEST_SINGULAR_VALUE) -> tuple[Triple, ...]:
    """Return the ``steps`` triples of Polar Express on [lowest, 1], before the safety ratio."""
    low, high = lowest, 1.0
    triples: list[Triple] = []
    for _ in range(steps):
        a, b, c = best_quintic(max(low, CUSHION * high), high)
        # A cushioned fit is centered on one over the wrong interval: recenter it over [low, high],
        # so that its smallest and largest values lie at equal distance from one.
        center = 2 / (_evaluate((a, b, c), low) + _evaluate((a, b, c), high))
        triple = (a * center, b * center, c * center)
        triples.append(triple)
        low = _evaluate(triple, low)
        high = 2 - low
    return tuple(triples)


def best_quintic(low: float, high: float) -> Triple:
    """Return the odd quintic on [low, high] with the smallest maximal deviation from one.

    The optimum takes the values 1 − E, 1 + E, 1 − E, 1 + E at low, two interior extrema and high.
    Remez' exchange finds the extrema: fit the four values, move to the extrema of the fit, repeat.

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
    """Solve p(x_i) = 1 ∓ E at four points for the triple; E is a by-product.

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


def main() -> None:
    """Print one row of triples after the other."""
    print("_POLAR_EXPRESS =", polar_express())
    print("_TIGHT =", tuple(map(tight, STEPS)))


if __name__ == "__main__":
    main()
