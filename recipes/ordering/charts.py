"""Figures of this recipe: a row of panels in the style of all recipes.

In: the number of panels, and axes. Out: labeled matplotlib axes, and PNG files.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image
from shared.style import COLORS, INK, MUTED, tidy

__all__ = ["COLORS", "INK", "MARKERS", "MUTED", "grid", "label", "logarithmic", "save"]

MARKERS = "osD^vP"


def grid(rows: int, columns: int, **settings: Any) -> tuple[plt.Figure, Any]:
    """Return a figure of panels, about 5 by 4 inches each, and their axes."""
    size = (1 + 4.9 * columns, 0.4 + 3.8 * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **settings)


def label(axes: plt.Axes, x: str, y: str, title: str) -> None:
    """Label the axes."""
    tidy(axes, x, y, title)


def logarithmic(axis: Any, ticks: Sequence[float]) -> None:
    """Make an axis (``axes.xaxis`` or ``axes.yaxis``) logarithmic, with plain numbers at ticks."""
    if axis.axis_name == "x":
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure with few colors, which makes the file a third of the size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    plt.close(figure)
    Image.open(image).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
