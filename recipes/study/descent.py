"""Coordinate descent on a grid: what a search tries next, given only the results so far.

In: the points to try first, an axis for each coordinate, the losses of earlier points. Out: the
points to try next; none once no neighbor of the best point is better. With one coordinate and a
first grid, this is a grid search that extends the grid while the best point is at an edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FACTOR = 2.0
"""Ratio of neighboring learning rates."""

Point = tuple[float, ...]
Axis = float | tuple[float, ...] | None
"""How a coordinate moves: times or over a number, along a list of values, or not at all."""


def next_points(
    losses: Mapping[Point, float], first: Sequence[Point], axes: Sequence[Axis]
) -> list[Point]:
    """Return the points to try next.

    They are neighbors of the best point along one axis: the axis in progress, so that a line is
    followed to its end, or else the first unfinished axis.

    Args:
        losses: losses of the points tried so far; infinite if a run diverged.
        first: points to try before all others.
        axes: axes of the coordinates, in the order of the search.
    """
    waiting = [point for point in dict.fromkeys(first) if point not in losses]
    if waiting:
        return waiting
    best = best_point(losses)
    lines = [
        [(*best[:number], value, *best[number + 1 :]) for value in neighbors(best[number], axis)]
        for number, axis in enumerate(axes)
    ]
    untried = [[point for point in line if point not in losses] for line in lines]
    under_way = [new for new, line in zip(untried, lines, strict=True) if 0 < len(new) < len(line)]
    return next(filter(None, [*under_way, *untried]), [])


def beyond_edge(grid: Mapping[float, float]) -> list[float]:
    """Return the neighbors of the best rate that are missing from a grid of loss by rate."""
    losses = {(rate,): loss for rate, loss in grid.items()}
    return [rate for (rate,) in next_points(losses, [], [FACTOR])]


def best_point(losses: Mapping[Point, float]) -> Point:
    """Return the point with the lowest loss.

    Of points with equal losses it is the first, so that the search does not follow a coordinate
    without effect. If all diverged it is the smallest, so that the search lowers the rates.
    """
    best = min(losses, key=losses.__getitem__)
    return best if math.isfinite(losses[best]) else min(losses)


def neighbors(value: float, axis: Axis) -> list[float]:
    """Return the neighbors of a value on its axis; 0 has none on a multiplicative axis."""
    if axis is None:
        return []
    if not isinstance(axis, tuple):
        return [value / axis, value * axis] if value else []
    place = axis.index(value)
    return [axis[beside] for beside in (place - 1, place + 1) if 0 <= beside < len(axis)]
