"""The loss curve: validation loss over tokens, one line per run, labeled at its end.

In: the contents of ``results.json`` files. Out: a PNG. The validation curve is measured on a fixed
subset of the held-out text, so its end differs a little from the loss on all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter
from shared.style import COLORS, MUTED, tidy


@dataclass(frozen=True)
class Line:
    """One labeled curve."""

    label: str
    tokens: Sequence[float]
    losses: Sequence[float]
    color: str
    width: float = 2.0


def loss_figure(runs: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the validation loss of every run over the tokens it was trained on.

    A run that is drawn alone gets its training loss as well, thin and gray.

    Args:
        runs: label of each run and the content of its ``results.json``.
        path: file to write.
        title: one line above the axes.
    """
    lines = lines_of(runs)
    figure, axes = plt.subplots(figsize=(7.2, 4.3), dpi=160)
    for line in lines:
        axes.plot(line.tokens, line.losses, color=line.color, linewidth=line.width)
        axes.plot(line.tokens[-1:], line.losses[-1:], "o", color=line.color, ms=2.4 * line.width)
    set_limits(axes, lines)
    label_ends(axes, lines)
    what = "validation loss" if len(runs) > 1 else "loss"
    tidy(axes, "training tokens", f"{what} (nats per token)", title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def lines_of(runs: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """Return the curves to draw."""
    colors = COLORS * len(runs)
    lines = [
        Line(label, *points(validation_curve(run)), color)
        for (label, run), color in zip(runs.items(), colors, strict=False)
    ]
    alone = next(iter(runs.values())) if len(runs) == 1 else None
    if alone is not None and alone["train_curve"]:
        training = Line("training", *points(alone["train_curve"]), MUTED, 1.0)
        return [training, replace(lines[0], label="validation")]
    return lines


def validation_curve(run: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the curve, or the final loss alone when nothing was measured along the way."""
    final = {"tokens": run["tokens"], "loss": run["final_validation_loss"]}
    return run["eval_curve"] or [final]


def points(curve: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """Return the tokens and the losses of a curve."""
    return [point["tokens"] for point in curve], [point["loss"] for point in curve]


def set_limits(axes: plt.Axes, lines: Sequence[Line]) -> None:
    """Show the curves without their steep start.

    The first losses, those of a random model, would compress the part that matters.
    """
    last = max(line.tokens[-1] for line in lines)
    late = [
        loss
        for line in lines
        for tokens, loss in zip(line.tokens, line.losses, strict=True)
        if tokens >= 0.1 * last
    ]
    lowest, top = min(late), max(late)
    axes.set_ylim(lowest - 0.06 * (top - lowest) - 0.02, top + 0.08 * (top - lowest) + 0.02)
    axes.set_xlim(0, 1.01 * last)


def label_ends(axes: plt.Axes, lines: Sequence[Line]) -> None:
    """Write each line's name beside its end, moved up where names would overlap."""
    bottom, top = axes.get_ylim()
    previous = -float("inf")
    for line in sorted(lines, key=lambda line: line.losses[-1]):
        previous = max(line.losses[-1], previous + 0.06 * (top - bottom))
        axes.annotate(
            line.label,
            xy=(line.tokens[-1], previous),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=line.color,
            fontweight="bold" if line.width > 1 else "normal",
            annotation_clip=False,
        )
