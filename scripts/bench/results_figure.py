"""Every setting of docs/filters.md against Muon's defaults: the figure of README.

In: the tables of the page, with a loss and a paired difference for each setting. Out: an image.

    python scripts/bench/results_figure.py docs/images/results.png
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from shared.style import COLORS, INK, MUTED, plt, tidy

PAGE = Path(__file__).parents[2] / "docs" / "filters.md"
ROW = re.compile(
    r"^\| (.+?) \| [\d.–]+ \| \**[\d.]+ ± [\d.]+\** \| ([+−][\d.]+) ± ([\d.]+) \|", re.M
)
HORIZONS = {"512 steps": "## Comparison of settings", "2,048 steps": "2,048 steps of 128 tokens:"}
COLOR = {"better": COLORS[2], "not told apart": MUTED, "worse": COLORS[0]}


def differences(text, heading):
    """The rows of the table that follows a heading: (setting, difference, standard error)."""
    table = text.split(heading)[1].split("| default")[1].split("\n\n")[0]
    return [
        (name.replace("`", ""), float(value.replace("−", "-")), float(error))
        for name, value, error in ROW.findall(table)
    ]


def verdict(value, error):
    """What two standard errors allow to say."""
    if abs(value) <= 2 * error:
        return "not told apart"
    return "better" if value < 0 else "worse"


def draw(path):
    """Draw a panel for each horizon."""
    panels = {name: differences(PAGE.read_text(), heading) for name, heading in HORIZONS.items()}
    heights = [len(rows) + 2 for rows in panels.values()]
    figure, axes = plt.subplots(
        2, 1, figsize=(8, 8), sharex=True, height_ratios=heights, layout="constrained"
    )
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        for place, (_, value, error) in enumerate(rows):
            color = COLOR[verdict(value, error)]
            axis.errorbar(value, place, xerr=2 * error, color=color, fmt="o", ms=4, capsize=2)
        axis.set_yticks(range(len(rows)), [setting for setting, *_ in rows], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(0, color=INK, lw=0.8)
        last = axis is axes[-1]
        meaning = "held-out loss minus that of Muon's defaults, ± 2 standard errors"
        tidy(axis, meaning if last else "", "", f"{name} of 128 tokens")
        axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1])
