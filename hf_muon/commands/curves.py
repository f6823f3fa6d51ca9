"""Curves that stay distinguishable in print, in dark mode and where they coincide.

In: points by name. Out: an SVG to put inside a page. Each line has its own color, style and width;
later ones are thinner and dashed, so that a line below another remains visible. The name of a line
stands beside its end, outside the axes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING

from hf_muon.diagnostics.plots import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_WIDTHS = (3.0, 2.2, 1.8, 1.4)
# Stand-ins for the page's colors, which follow the reader's light or dark mode.
_INK, _LINE = "#010203", "#040506"
_OF_PAGE = {_INK: "currentColor", _LINE: "var(--line)"}
_SKIPPED = 0.1
"""Share of the steps, at the beginning, that may lie outside the frame: they flatten the rest."""


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    x_label: str = "step",
    *,
    cut_begin: bool = False,
) -> str:
    """Draw values over steps; return the SVG, or an empty string if there are no values.

    Args:
        series: Points (x, y) by name.
        label: Title of the y axis.
        x_label: Title of the x axis. Default: ``step``.
        cut_begin: Whether the first values may lie outside the frame. Default: no.
    """
    there = {name: points for name, points in series.items() if points}
    if not there:
        return ""
    figure = new_figure(5.6, 3.3)
    from matplotlib.ticker import EngFormatter

    axes = figure.subplots()
    lines = []
    for (name, points), color, style, width in zip(
        there.items(), cycle(COLORS), cycle(_STYLES), cycle(_WIDTHS), strict=False
    ):
        few = "o" if len(points) < 4 else ""
        x, y = zip(*points, strict=True)
        lines += axes.plot(
            x, y, label=name, color=color, linestyle=style, linewidth=width, marker=few, ms=5
        )
    if cut_begin:
        _frame(axes, list(there.values()))
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M, not 1000000
    axes.set_title(label, loc="left", fontsize=10)
    ends = [points[-1][1] for points in there.values()]
    _label_ends(axes, list(zip(lines, ends, strict=True)))
    return svg(figure, label)


def _frame(axes: Axes, every: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Fit the frame to all but the first steps, if enough points remain."""
    last = max(x for points in every for x, _ in points)
    late = [y for points in every for x, y in points if x >= _SKIPPED * last]
    if len(late) > 2 and max(late) > min(late):
        room = 0.06 * (max(late) - min(late))
        axes.set_ylim(min(late) - room, max(late) + room)


def _label_ends(axes: Axes, lines: Sequence[tuple[Line2D, float]]) -> None:
    """Write each line's name beside its end; move it up if two names would overlap."""
    axes.get_figure().draw_without_rendering()  # type: ignore[union-attr]  # settles the limits
    low, high = axes.get_ylim()
    gap, previous = 0.075 * (high - low), -float("inf")
    highest = high - gap * (len(lines) - 1)
    for line, last in sorted(lines, key=lambda one: one[1]):
        end = min(max(last, low), max(highest, low))
        previous = max(end, previous + gap)
        highest += gap
        axes.annotate(
            str(line.get_label()),
            xy=(1, previous),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            fontsize=9,
            fontweight="bold",
            gid="label",
            annotation_clip=False,
        )


def svg(figure: Figure, description: str) -> str:
    """Return a figure as SVG to put inside a page, with text and axes in the page's colors."""
    import matplotlib as mpl

    _use_page_colors(figure)
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    found = text.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", found)  # HTML does not need them
    for stand_in, color in _OF_PAGE.items():
        found = found.replace(stand_in, color)
    name = f'<svg role="img" aria-label="{escape(description)}"'
    # Drop the size of the image, in points: the page sets its size.
    return re.sub(r'<svg( height="[^"]*")?( width="[^"]*")?', lambda _: name, found, count=1)


def _use_page_colors(figure: Figure) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if text.get_gid() != "label":
            text.set_color(_INK)
    for axes in figure.axes:
        axes.tick_params(colors=_INK, labelsize=8.5)
        axes.spines[:].set_edgecolor(_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
