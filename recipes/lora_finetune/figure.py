"""The figure of a study: loss over learning rate at one rank, and loss over rank.

In: the content of ``study.json``. Out: a PNG. Losses far above the rest, of rates that are too
large, are cut off.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from shared.style import COLOURS, MUTED, tidy

MARKERS = "osD^v"


def study_figure(report: Mapping[str, Any], path: Path) -> None:
    """Draw both panels.

    Args:
        report: ranks with the grids and the final runs of each method; the first rank is the one
            whose grids are drawn.
        path: file to write.
    """
    ranks = report["ranks"]
    first = next(iter(ranks))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), dpi=130, sharey=True)
    looks = dict(zip(ranks[first]["grids"], zip(COLOURS, MARKERS, strict=False), strict=False))
    for method, look in looks.items():
        draw_grid(left, ranks[first]["grids"][method], *look, method)
        draw_ranks(right, {rank: part["final"][method] for rank, part in ranks.items()}, *look)
    axis_of(left, sorted({rate for grid in ranks[first]["grids"].values() for rate in grid}), 2)
    axis_of(right, sorted(ranks), 1)
    left.set_ylim(*limits(ranks))
    tidy(left, "learning rate", "validation loss", f"rank {first}, seed 0")
    tidy(right, "rank", "", "best rates, other seeds: mean and range")
    figure.legend(loc="upper center", ncols=len(looks), frameon=False, bbox_to_anchor=(0.5, 1.06))
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def draw_grid(
    axes: plt.Axes, grid: Mapping[float, float], colour: str, marker: str, label: str
) -> None:
    """Draw the losses of a grid, the best of them filled."""
    rates = sorted(grid)
    best = min(rates, key=grid.__getitem__)
    losses = [grid[rate] for rate in rates]
    axes.plot(rates, losses, color=colour, marker=marker, mfc="white", ms=6, lw=2, label=label)
    axes.plot([best], [grid[best]], color=colour, marker=marker, ms=8)


def draw_ranks(
    axes: plt.Axes, finals: Mapping[int, Mapping[str, Any]], colour: str, marker: str
) -> None:
    """Draw mean and range of the seeds over the ranks."""
    ranks = sorted(finals)
    losses = [finals[rank]["loss"] for rank in ranks]
    means = [loss["mean"] for loss in losses]
    axes.plot(ranks, means, color=colour, marker=marker, ms=6, lw=2)
    for rank, loss in zip(ranks, losses, strict=True):
        axes.plot([rank] * 2, [min(loss["values"]), max(loss["values"])], color=colour, lw=1)


def axis_of(axes: plt.Axes, ticks: Sequence[float], every: int) -> None:
    """Put a logarithmic axis under the values that occur, every second or all of them labelled."""
    axes.set_xscale("log", base=2)
    shown = set(ticks[::every])
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x in shown else ""))
    axes.tick_params(axis="x", color=MUTED)


def limits(ranks: Mapping[int, Mapping[str, Any]]) -> tuple[float, float]:
    """Return lowest and highest loss to show: all but what lies far above the middle."""
    losses = [
        loss
        for part in ranks.values()
        for group in (*part["grids"].values(), *map(by_seed, part["final"].values()))
        for loss in group.values()
        if math.isfinite(loss)
    ]
    lowest, middle = min(losses), statistics.median(losses)
    top = min(max(losses), lowest + 3 * (middle - lowest))
    return lowest - 0.08 * (top - lowest), top + 0.05 * (top - lowest)


def by_seed(final: Mapping[str, Any]) -> dict[int, float]:
    """Return the loss of each seed."""
    return dict(enumerate(final["loss"]["values"]))
