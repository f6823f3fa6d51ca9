"""The style of all recipes' figures.

In: axes. Out: the same axes without frame and with a faint grid; colors to draw with.
"""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's palette, distinguishable with the common color-vision deficiencies.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED = "#222222", "#8a8a8a"


def tidy(axes: plt.Axes, x: str, y: str, title: str) -> None:
    """Label the axes, and remove what nobody reads."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=12)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, length=3)
