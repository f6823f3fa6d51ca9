"""The loss curve: validation loss over tokens, one line per run, labelled at its end.

In: the contents of ``results.json`` files. Out: a PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

# Okabe and Ito's palette, distinguishable with the common colour deficiencies.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED = "#222222", "#8a8a8a"


def loss_figure(runs: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the validation loss of every run over the tokens it was trained on.

    Args:
        runs: label of each run and the content of its ``results.json``.
        path: file to write.
        title: one line above the axes.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4.3), dpi=160)
    for (_, run), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        draw_run(axes, run, colour, with_training=len(runs) == 1)
    set_limits(axes, runs)
    label_ends(axes, runs)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=12)
    axes.set_xlabel("training tokens", color=INK)
    axes.set_ylabel("validation loss (nats per token)", color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, length=3)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def draw_run(axes: plt.Axes, run: Mapping[str, Any], colour: str, *, with_training: bool) -> None:
    """Draw one run; a run that is shown alone also gets its training loss, thin and grey."""
    if with_training and run["train_curve"]:
        tokens, losses = points(run["train_curve"])
        axes.plot(tokens, losses, color=MUTED, linewidth=1, alpha=0.7, zorder=1)
        middle = len(tokens) // 2
        axes.annotate(
            "training",
            (tokens[middle], losses[middle]),
            xytext=(4, 8),
            textcoords="offset points",
            color=MUTED,
        )
    tokens, losses = points(validation_curve(run))
    axes.plot(tokens, losses, color=colour, linewidth=2, solid_capstyle="round")
    axes.plot(tokens[-1:], losses[-1:], "o", color=colour, markersize=5)


def validation_curve(run: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the curve, or the final loss alone when nothing was measured along the way."""
    final = {"tokens": run["tokens"], "loss": run["final_validation_loss"]}
    return run["eval_curve"] or [final]


def points(curve: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """Return the tokens and the losses of a curve."""
    return [point["tokens"] for point in curve], [point["loss"] for point in curve]


def set_limits(axes: plt.Axes, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Leave room for the labels, and cut the steep start off when the curves are long.

    The first losses are those of a random model and would flatten the part that is compared.
    """
    curves = [points(validation_curve(run))[1] for run in runs.values()]
    lowest = min(min(curve) for curve in curves)
    late = [loss for curve in curves for loss in curve[max(1, len(curve) // 10) :]]
    top = max(late, default=max(curves[0]))
    axes.set_ylim(lowest - 0.05 * (top - lowest) - 0.02, top + 0.08 * (top - lowest) + 0.02)
    axes.set_xlim(left=0)


def label_ends(axes: plt.Axes, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each run's name and last loss beside its end, pushed apart where they would overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.055 * (top - bottom)
    previous = -float("inf")
    coloured = list(zip(runs.items(), COLOURS * len(runs), strict=False))
    for (label, run), colour in sorted(coloured, key=lambda item: last_loss(item[0][1])):
        height = max(last_loss(run), previous + gap)
        previous = height
        axes.annotate(
            f"{label}  {last_loss(run):.3f}",
            xy=(validation_curve(run)[-1]["tokens"], height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def last_loss(run: Mapping[str, Any]) -> float:
    """Return the last point of the validation curve."""
    return float(validation_curve(run)[-1]["loss"])
