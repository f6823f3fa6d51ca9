"""The figure of a study: loss over learning rate at one rank, and loss over rank.

In: the content of ``study.json``. Out: a PNG. Losses far above the rest, from rates that are too
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
from shared.style import COLORS, tidy

MARKERS = "osD^vP"
LABELS = {
    "adamw": "AdamW",
    "loraplus": "LoRA+ (AdamW)",
    "factor": "Muon, factor",
    "product": "Muon, product",
    "tangent": "Muon, tangent",
    "muon_on_b": "Muon on B, AdamW on A",
}
ASIDE = 1.03
"""Points of neighboring methods stand so much apart, as a ratio, that their ranges can be read."""


def study_figure(report: Mapping[str, Any], path: Path) -> None:
    """Draw both panels, means with the range of the seeds.

    Args:
        report: by rank and method, the result at each rate, and the best rate; rates are drawn for
            the first rank.
        path: file to write.
    """
    ranks = report["ranks"]
    first = next(iter(ranks))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), dpi=130, sharey=True)
    for number, (method, part) in enumerate(ranks[first].items()):
        look = {"color": COLORS[number], "marker": MARKERS[number]}
        aside = ASIDE ** (number - (len(ranks[first]) - 1) / 2)
        at_rates = {rate * aside: at["loss"] for rate, at in part["rates"].items()}
        bests = {rank: methods[method] for rank, methods in ranks.items()}
        at_ranks = {r * aside: each["rates"][each["best"]]["loss"] for r, each in bests.items()}
        draw(left, at_rates, look, LABELS[method])
        draw(right, at_ranks, look)
    axis_of(left, sorted({rate for part in ranks[first].values() for rate in part["rates"]}), 2)
    axis_of(right, sorted(ranks), 1)
    left.set_ylim(*limits(ranks))
    tidy(left, "learning rate", "validation loss", f"rank {first}")
    tidy(right, "rank", "", "at the best rate of each rank")
    labels = left.get_legend_handles_labels()
    figure.legend(*labels, loc="upper center", ncols=6, frameon=False, bbox_to_anchor=(0.5, 1.06))
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def draw(
    axes: plt.Axes,
    losses: Mapping[float, Mapping[str, Any]],
    look: Mapping[str, str],
    label: str | None = None,
) -> None:
    """Draw mean losses as a line, the range of several seeds as bars, single ones hollow."""
    several = {x: loss for x, loss in losses.items() if len(loss["values"]) > 1}
    for x, loss in several.items():
        axes.plot([x, x], [min(loss["values"]), max(loss["values"])], color=look["color"], lw=1)
    at = sorted(losses)
    axes.plot(at, [losses[x]["mean"] for x in at], lw=2, ms=6, mfc="white", **look, label=label)
    axes.plot(list(several), [loss["mean"] for loss in several.values()], lw=0, ms=6, **look)


def axis_of(axes: plt.Axes, ticks: Sequence[float], every: int) -> None:
    """Make an axis logarithmic with ticks at the values that occur; label all or every second."""
    axes.set_xscale("log", base=2)
    shown = set(ticks[::every])
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x in shown else ""))


def limits(ranks: Mapping[int, Mapping[str, Any]]) -> tuple[float, float]:
    """Return the lowest and highest loss to show: all except those far above the median."""
    losses = [
        loss
        for methods in ranks.values()
        for part in methods.values()
        for at in part["rates"].values()
        for loss in at["loss"]["values"]
        if math.isfinite(loss)
    ]
    lowest, middle = min(losses), statistics.median(losses)
    top = min(max(losses), lowest + 3 * (middle - lowest))
    return lowest - 0.08 * (top - lowest), top + 0.05 * (top - lowest)
