"""The tables of a study, as Markdown.

In: records, and the plans. Out: a row for each arm in a cell: where its search ended; mean,
standard deviation and standard error over fresh seeds; the paired difference from the reference and
its meaning; the cost. Recipes add their own columns.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from study.descent import Point
from study.harness import Plan, named
from study.paired import (
    FEWEST,
    SURE,
    Estimate,
    Losses,
    certainty,
    difference,
    estimate,
    verdict,
)
from study.records import Line, Records


@dataclass(frozen=True)
class Row:
    """The results of an arm in a cell.

    Attributes:
        plan: its plan.
        best: the best point of the search so far.
        searched: loss in the search, by point.
        losses: losses at the best point, by fresh seed.
        lines: all trainings of the arm in the cell.
        is_settled: whether the search has tried all neighbors of the best point.
    """

    plan: Plan
    best: Point
    searched: Mapping[Point, float]
    losses: Losses
    lines: Sequence[Line]
    is_settled: bool

    @property
    def seconds(self) -> float:
        """The median duration of a training."""
        return statistics.median(line["found"]["seconds"] for line in self.lines)


Column = tuple[str, Callable[[Row, Row | None], str]]
"""A heading, and what stands below it for a row and that of the reference in its cell."""


def rows(records: Records, plans: Iterable[Plan]) -> list[Row]:
    """Return the rows of the plans that have at least one training."""
    return [found for plan in plans if (found := row_of(plan, records)) is not None]


def row_of(plan: Plan, records: Records) -> Row | None:
    """Return the results of a plan; None if there are none."""
    searched = plan.tried(records)
    best = plan.best(records) or plan.start
    fresh = {line["seed"] for line in records} - set(plan.search_seeds)
    runs = {seed: plan.run(best, seed) for seed in sorted(fresh)}
    losses = {seed: records.loss(run) for seed, run in runs.items() if run in records}
    lines = [line for line in records if plan.holds(line)]
    if not searched and not losses:
        return None
    is_settled = not plan.is_searched or not plan.untried(searched)
    return Row(plan, best, searched, losses, lines, is_settled)


def cells_of(records: Iterable[Line]) -> list[dict[str, Any]]:
    """Return the cells that have at least one training, sorted by their values."""
    found = {json.dumps(line["cell"], sort_keys=True): line["cell"] for line in records}
    return sorted(found.values(), key=_place)


def _place(cell: Mapping[str, Any]) -> list[tuple[str, bool, Any]]:
    # Numbers by size: 64 before 128.
    return [(name, isinstance(value, str), value) for name, value in sorted(cell.items())]


def columns(reference: str, target: float | None = None) -> list[Column]:
    """Return the columns that every study has; ``target`` is a loss to reach."""
    made: list[Column] = [
        ("arm", lambda row, base: row.plan.name),
        ("best point", lambda row, base: point_text(row)),
        ("points tried", lambda row, base: search_text(row)),
        ("held-out loss", lambda row, base: loss_text(row.losses)),
        ("standard error", lambda row, base: error_text(row.losses)),
        (f"against {reference}", lambda row, base: difference_text(compared(row, base))),
        ("", lambda row, base: verdict_text(row, base)),
        ("seconds a run", lambda row, base: f"{row.seconds:.1f}"),
    ]
    if target is not None:
        made.insert(5, (f"reaches {target:g}", lambda row, base: target_text(row.losses, target)))
    return made


def table(found: Sequence[Row], reference: str, shown: Sequence[Column]) -> list[str]:
    """Return the lines of a table with the rows of one cell."""
    base = next((row for row in found if row.plan.name == reference), None)
    body = [cells([text(row, base) for _, text in shown]) for row in found]
    return [cells([head for head, _ in shown]), cells(["---"] * len(shown)), *body]


def cells(texts: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(texts)} |"


def title(cell: Mapping[str, Any], lines: Iterable[Line]) -> str:
    """Return the heading of a cell, with the cost of its trainings."""
    return f"**{named(cell)}**; {cost(lines)}"


def cost(lines: Iterable[Line]) -> str:
    """Return the number of trainings and their duration."""
    seconds = [line["found"]["seconds"] for line in lines]
    return f"{len(seconds)} trainings, {sum(seconds) / 3600:.2f} process-hours"


def point_text(row: Row) -> str:
    """Return the best point by coordinate."""
    return named(row.plan.run(row.best, 0).point)


def search_text(row: Row) -> str:
    """Return how many points of the budget were tried, and whether the search is finished."""
    if not row.plan.is_searched:
        return "–"
    spent = f"{len(row.searched)} of at most {row.plan.budget}"
    if row.is_settled:
        return spent
    return f"{spent}, not settled"


def loss_text(losses: Losses) -> str:
    """Return mean ± standard deviation (number of seeds)."""
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if len(finite) < len(losses):
        return f"{len(losses) - len(finite)} of {len(losses)} diverge"
    if not finite:
        return "–"
    spread = f" ± {statistics.stdev(finite):.4f}" if len(finite) > 1 else ""
    return f"{statistics.fmean(finite):.4f}{spread} ({len(finite)})"


def error_text(losses: Losses) -> str:
    """Return the standard error of the mean."""
    found = estimate(list(losses.values()))
    return "–" if found is None or found.error is None else f"{found.error:.4f}"


def compared(row: Row, base: Row | None) -> Estimate | None:
    """Return the paired difference from the reference; None for itself, or with under two pairs."""
    if base is None or row is base:
        return None
    found = difference(row.losses, base.losses)
    return None if found is None or found.error is None else found


def difference_text(found: Estimate | None) -> str:
    """Return a paired difference ± its standard error, which a single pair does not have."""
    if found is None:
        return "–"
    return f"{found.mean:+.4f}" + ("" if found.error is None else f" ± {found.error:.4f}")


def verdict_text(row: Row, base: Row | None) -> str:
    """Say what the difference from the reference means."""
    if base is None or row is base:
        return ""
    found = compared(row, base)
    return "no pairs" if found is None else verdict(found)


def target_text(losses: Losses, target: float) -> str:
    """Say whether a target is met with certainty, and by how many standard errors."""
    found = certainty(losses, target)
    if found is None:
        return f"fewer than {FEWEST} seeds"
    return f"{'yes' if found >= SURE else 'no'}, {found:+.1f} errors"
