"""Does the best learning rate stay when a model grows? Widths over step-size rules.

In: widths. Out: a JSONL file with a line for each training, a table for each width, and a figure of
loss over rate. Each step-size rule (``adjust_lr``) searches the rate of the matrices on a grid of
five rates, extended while the best rate is at an edge; everything else has one fixed rate. The same
command resumes.

    python widths.py run --out runs/widths.jsonl --jobs 2
    python widths.py report --out runs/widths.jsonl --figure runs/widths.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared and recipes/study

import matplotlib.pyplot as plt
from shared.style import COLORS, tidy
from study import command
from study.byte_llama import multiple_of_head, sizes, train
from study.harness import Arm
from study.tables import Row

STARTS = {"match_rms_adamw": 4e-3, "spectral": 1.6e-2, "original": 1.6e-2}
"""Where the search of each rule begins."""


def arm(rule: str, rate: float) -> Arm:
    """Return an arm whose first grid reaches two steps to each side of ``rate``, for the curve."""
    first = [{"rate": rate * 2.0**power} for power in range(-2, 3)]
    settings = {"optimizer": "muon", "adjust_lr": rule, "momentum": 0.9, "nesterov": False}
    settings["coefficients"] = "polar_express"  # as in docs/learning_rates.md
    return Arm(settings, {"rate": rate}, {"rate": 2.0}, first)


ARMS = {rule: arm(rule, rate) for rule, rate in STARTS.items()}
REFERENCE = "match_rms_adamw"
WIDTHS, BUDGET = (32, 64, 128, 256), 12


def curve(row: Row) -> tuple[list[float], list[float]]:
    """Return the rates that the search tried, sorted, and their losses."""
    pairs = sorted((point[0], loss) for point, loss in row.searched.items())
    return [rate for rate, _ in pairs], [loss for _, loss in pairs]


def draw(found: Sequence[Sequence[Row]], path: Path) -> None:
    """Draw a panel for each rule, with a curve for each width and its best rate marked."""
    figure, panels = plt.subplots(
        1, len(ARMS), figsize=(11, 3.8), dpi=130, sharey=True, layout="constrained"
    )
    for axes, rule in zip(panels, ARMS, strict=True):
        tried: set[float] = set()
        for color, cell in zip(COLORS, found, strict=False):
            row = next((row for row in cell if row.plan.name == rule), None)
            if row is None or not row.searched:
                continue
            rates, losses = curve(row)
            tried.update(rates)
            width = row.plan.cell["width"]
            axes.plot(rates, losses, "o-", color=color, ms=3.5, lw=1.4, label=f"{width} wide")
            axes.plot(row.best[0], row.searched[row.best], "o", color=color, ms=9, mfc="none")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(tried), [f"{rate:g}" for rate in sorted(tried)])
        tidy(axes, "learning rate of the matrices", "", rule)
    lowest = [min(row.searched.values()) for cell in found for row in cell if row.searched]
    panels[0].set_ylim(min(lowest) - 0.02, statistics.median(lowest) + 0.5)
    panels[0].set_ylabel("held-out loss, seed 0")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser, running, _ = command.parsers(__doc__, list(ARMS), BUDGET)
    running.add_argument(
        "--widths", nargs="+", type=multiple_of_head, default=WIDTHS, help="multiples of 16"
    )
    running.add_argument("--cell", default="128x512", help="tokens of a step x steps")
    running.add_argument("--adamw-rate", type=float, default=8e-3, help="of all but matrices")
    running.add_argument("--corpus", default="shakespeare+sotu", help="as the recipes name them")
    return parser.parse_args(argv)


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what all rules have in common, for each width."""
    tokens, steps = sizes(arguments.cell)
    kept = {"adamw_rate": arguments.adamw_rate, "noise": "none", "noise_scale": 0.0}
    return [
        {"width": width, "tokens": tokens, "steps": steps, **kept, "corpus": arguments.corpus}
        for width in arguments.widths
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, or print the tables."""
    arguments = parsed(argv)
    command.execute(arguments, ARMS, REFERENCE, lambda: (cells(arguments), train), figure=draw)


if __name__ == "__main__":
    main()
