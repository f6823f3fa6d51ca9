"""The figure of a study: losses of the seeds, and paired differences from the reference.

In: the rows of one cell. Out: a figure. It leaves out diverged runs; labels give their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from shared.style import COLORS, INK, MUTED, tidy

from study.paired import estimate
from study.tables import Row, compared


def draw(found: Sequence[Row], reference: str, path: Path, title: str) -> None:
    """Draw both panels, with one line per arm.

    Args:
        found: rows of one cell; those without fresh seeds are left out.
        reference: the arm that the others are compared with.
        path: file to write.
        title: one line above the panels.
    """
    shown = [row for row in found if row.losses]
    base = next((row for row in shown if row.plan.name == reference), None)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, 0.42 * len(shown) + 1.7), dpi=130, sharey=True, layout="constrained"
    )
    for height, row in enumerate(shown):
        color = COLORS[height % len(COLORS)]
        draw_losses(left, row, height, color)
        draw_difference(right, row, base, height, color)
    left.set_yticks(range(len(shown)), [label(row) for row in shown])
    left.set_ylim(len(shown) - 0.5, -0.5)
    right.axvline(0, color=MUTED, lw=1, ls="--")
    tidy(left, "held-out loss", "", title)
    tidy(right, f"difference to {reference}, paired by seed", "", "mean ± 2 standard errors")
    for axes in (left, right):
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.grid(axis="y", visible=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_losses(axes: plt.Axes, row: Row, height: int, color: str) -> None:
    """Draw every seed as a dot, and the mean as a line."""
    finite = [loss for loss in row.losses.values() if math.isfinite(loss)]
    axes.plot(finite, [height] * len(finite), "o", color=color, ms=5, alpha=0.6)
    found = estimate(finite)
    if found is not None:
        axes.plot([found.mean], [height], "|", color=INK, ms=16, mew=1.5)


def draw_difference(axes: plt.Axes, row: Row, base: Row | None, height: int, color: str) -> None:
    """Draw the mean difference with a bar of two standard errors to each side."""
    found = compared(row, base)
    if found is not None and found.error is not None:
        axes.errorbar(found.mean, height, xerr=2 * found.error, fmt="o", color=color, capsize=3)


def label(row: Row) -> str:
    """Return the name of an arm with its number of seeds, and how many of them diverged."""
    lost = sum(not math.isfinite(loss) for loss in row.losses.values())
    seeds = f"{len(row.losses)} seed" + "s" * (len(row.losses) > 1)
    return f"{row.plan.name} ({seeds}{f', {lost} diverged' if lost else ''})"
