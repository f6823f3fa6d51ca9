"""Coordinate descent on a grid: what a search tries next, given only the results so far.

In: the points to try first, an axis for each coordinate, the losses of earlier points. Out: the
points to try next; none once no neighbour of the best point is better. With one coordinate and a
first grid it is a grid search that grows where its best point is at an edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FACTOR = 2.0
"""Ratio of neighbouring learning rates."""

Point = tuple[float, ...]
Axis = float | tuple[float, ...] | None
"""How a coordinate moves: by a factor, along values in their order, or not at all."""


def next_points(
    losses: Mapping[Point, float], first: Sequence[Point], axes: Sequence[Axis]
) -> list[Point]:
    """Return the points to try next.

    They are neighbours of the best point along one axis: the axis that is being searched, so that a
    line is followed to its end, or else the first axis that is not finished.

    Args:
        losses: of the points that were tried; infinite if a run diverged.
        first: points to try before all others.
        axes: of the coordinates, in the order in which they are searched.
    """
    waiting = [point for point in dict.fromkeys(first) if point not in losses]
    if waiting:
        return waiting
    best = best_point(losses)
    lines = [
        [(*best[:number], value, *best[number + 1 :]) for value in neighbours(best[number], axis)]
        for number, axis in enumerate(axes)
    ]
    untried = [[point for point in line if point not in losses] for line in lines]
    under_way = [new for new, line in zip(untried, lines, strict=True) if 0 < len(new) < len(line)]
    return next(filter(None, [*under_way, *untried]), [])


def beyond_edge(grid: Mapping[float, float]) -> list[float]:
    """Return the rates beside the best one that are missing in a grid of loss by rate."""
    losses = {(rate,): loss for rate, loss in grid.items()}
    return [rate for (rate,) in next_points(losses, [], [FACTOR])]


def best_point(losses: Mapping[Point, float]) -> Point:
    """Return the point of the lowest loss: the first of equal ones, the smallest of diverged ones.

    So a coordinate without effect is not followed, and rates fall while nothing trains.
    """
    best = min(losses, key=losses.__getitem__)
    return best if math.isfinite(losses[best]) else min(losses)


def neighbours(value: float, axis: Axis) -> list[float]:
    """Return the existing values beside one; on a multiplicative axis without 0."""
    if axis is None:
        return []
    if not isinstance(axis, tuple):
        return [value / axis, value * axis] if value else []
    place = axis.index(value)
    return [axis[beside] for beside in (place - 1, place + 1) if 0 <= beside < len(axis)]
