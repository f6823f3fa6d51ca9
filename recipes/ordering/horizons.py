"""When does filtering first pay: orders over batch, length of the run and noise, all tuned.

In: names of arms and cells. Out: a JSONL file with a line for each training, Markdown tables, and a
figure of the gap between the orders against the measured noise. On seed 0, each arm searches the
rate of the matrices, its momentum β and the rate of everything else. The reported losses are paired
and come from seeds that the search did not use. A stopped study continues with the same command.

    python horizons.py run --out runs/horizons.jsonl --jobs 2
    python horizons.py run --out runs/horizons.jsonl --cells 512x512 2048x128 --noise-scale 3
    python horizons.py report --out runs/horizons.jsonl --figure runs/horizons.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared and recipes/study

import matplotlib.pyplot as plt
from shared.style import COLORS, MUTED, tidy
from study import command, tables
from study.byte_llama import WIDTH, multiple_of_head, sizes, train
from study.descent import Axis
from study.harness import Arm
from study.paired import Estimate, difference
from study.tables import Row

BETAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
COEFFICIENTS = "polar_express"  # as in the tables of docs/orders.md, whatever the default is
RATES = {"rate": 2.0, "adamw_rate": 2.0}
ALL = {"rate": 2.0, "momentum": BETAS, "adamw_rate": 2.0}


def muon(rate: float, axes: Mapping[str, Axis] = ALL, **settings: Any) -> Arm:
    """Return an arm of Muon, without Nesterov by default; its search begins at β = 0.9."""
    point = {"rate": rate, "momentum": 0.9, "adamw_rate": 8e-3}
    start = {name: value for name, value in point.items() if name in axes}
    kept = {"optimizer": "muon", "nesterov": False, "coefficients": COEFFICIENTS}
    return Arm({**kept, **settings}, start, axes)


REFERENCE, FIXED, OTHERS = "pre_polar", "pre_0.95", ("post_polar", "polar_only")
ARMS = {
    REFERENCE: muon(4e-3),
    "post_polar": muon(3.2e-2, order="post_polar"),
    "polar_only": muon(1.6e-2, RATES, order="polar_only"),
    FIXED: muon(4e-3, RATES, momentum=0.95),
    "nesterov": muon(4e-3, nesterov=True),
    # Whether other defaults would be better: only the rates are searched.
    "polar_express": muon(4e-3, RATES, nesterov=True, momentum=0.95),
    "tight": muon(4e-3, RATES, nesterov=True, momentum=0.95, coefficients="tight"),
    "adamw": Arm({"optimizer": "adamw"}, {"rate": 1e-3, "momentum": 0.9, "adamw_rate": 8e-3}, ALL),
    "untrained": muon(0.0, RATES),  # the control: matrices stay at their initial values
}
CELLS = ("128x128", "128x512", "512x128", "512x512", "2048x128", "128x2048", "2048x512")
"""Tokens of a step x steps."""
CORPUS = "shakespeare+sotu"
BUDGET = 24
"""Points that the search of an arm may try."""


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cells: what all arms have in common."""
    noise, corpus = "white" if arguments.noise_scale else "none", arguments.corpus
    kept = {"noise": noise, "noise_scale": arguments.noise_scale, "corpus": corpus}
    if arguments.width != WIDTH:
        kept["width"] = arguments.width
    return [
        {"tokens": tokens, "steps": steps, **kept} for tokens, steps in map(sizes, arguments.cells)
    ]


def gap(cell: Sequence[Row], arm: str = REFERENCE) -> Estimate | None:
    """Return how much filtering first gains over the better of the other orders, paired by seed.

    The search decides which order is better, on other seeds.
    """
    by_name = {row.plan.name: row for row in cell}
    others = [by_name[name] for name in OTHERS if name in by_name]
    if arm not in by_name or len(others) < len(OTHERS):
        return None
    best = min(others, key=lambda row: min(row.searched.values()))
    return difference(best.losses, by_name[arm].losses)


def reading(cell: Sequence[Row], arm: str, name: str, place: str = "0.5") -> float | None:
    """Return the median of a reading over an arm's fresh seeds at its best point."""
    row = {row.plan.name: row for row in cell}[arm]
    at_best = row.plan.run(row.best, 0).point
    lines = [one["found"] for one in row.lines if one["point"] == at_best and one["seed"]]
    found = [
        one["nsr"].get(place) if name == "nsr" else one["readings"].get(place, {}).get(name)
        for one in lines
    ]
    values = [value for value in found if value is not None]
    return statistics.median(values) if values else None


def named(cell: Mapping[str, Any]) -> str:
    """Return a cell's size, and what else is not as usual."""
    text = f"{cell['tokens']} × {cell['steps']}"
    if "width" in cell:
        text += f", {cell['width']} wide"
    return text + f", {cell['corpus']}" * (cell["corpus"] != CORPUS)


def overview(found: Sequence[Sequence[Row]]) -> list[str]:
    """Return a table with a line for each cell that has all orders: losses, gain, readings."""
    heads = ["tokens × steps", "noise added", "noise to signal", REFERENCE, *OTHERS]
    heads += ["gain", f"gain of {FIXED}"]
    lines = [tables.cells(heads), tables.cells(["---"] * len(heads))]
    for cell in found:
        if (gained := gap(cell)) is None:
            continue
        at, by_name = cell[0].plan.cell, {row.plan.name: row for row in cell}
        noise = reading(cell, REFERENCE, "nsr")
        losses = [loss_and_momentum(by_name[name]) for name in (REFERENCE, *OTHERS)]
        measured = "–" if noise is None else f"{noise:.3g}"
        gains = [tables.difference_text(one) for one in (gained, gap(cell, FIXED))]
        lines.append(tables.cells([named(at), f"{at['noise_scale']:g}", measured, *losses, *gains]))
    return lines if len(lines) > 2 else []


def loss_and_momentum(row: Row) -> str:
    """Return the loss over fresh seeds and, where it was searched, the best β."""
    beta = row.plan.run(row.best, 0).point.get("momentum")
    return tables.loss_text(row.losses) + (f", β {beta:g}" if beta is not None else "")


def draw(found: Sequence[Sequence[Row]], path: Path) -> None:
    """Draw the gap of each cell against two readings, taken half way in runs of the reference."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.4), dpi=130, layout="constrained")
    steps = sorted({cell[0].plan.cell["steps"] for cell in found})
    of_panels = (
        (REFERENCE, "nsr", "noise to signal of a step's gradient", "β searched"),
        (FIXED, "pre_5", "descent on the next gradient along O(mean of five)", "β = 0.95"),
    )
    for axes, (arm, name, label, title) in zip(panels, of_panels, strict=True):
        for cell in found:
            at, estimate = cell[0].plan.cell, gap(cell, arm)
            x = None if estimate is None else reading(cell, REFERENCE, name)
            if x is None:
                continue
            bar = 2 * estimate.error if estimate.error else None
            color = COLORS[steps.index(at["steps"]) % len(COLORS)]
            axes.errorbar(x, estimate.mean, yerr=bar, fmt="o", color=color, capsize=3)
            text = named(at) + f", noise {at['noise_scale']:g}" * bool(at["noise_scale"])
            # Those with noise lie near those without: their labels go to the end of the bar.
            y = estimate.mean + (bar or 0) * bool(at["noise_scale"])
            axes.annotate(text, (x, y), (5, 4), textcoords="offset points", fontsize=7)
        axes.axhline(0, color=MUTED, lw=1, ls="--")
        tidy(axes, label, "", f"what filtering first gains, {title}")
    panels[0].set_ylabel("nats ± 2 standard errors")
    panels[0].set_xscale("log")
    panels[1].axvline(0, color=MUTED, lw=1, ls="--")
    figure.savefig(path)
    plt.close(figure)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser, running, _ = command.parsers(__doc__, list(ARMS), BUDGET)
    running.add_argument("--cells", nargs="+", default=CELLS, help="tokens of a step x steps")
    running.add_argument(
        "--noise-scale", type=float, default=0.0, help="normal noise, in norms of each gradient"
    )
    running.add_argument(
        "--width", type=multiple_of_head, default=WIDTH, help="of the model; a multiple of 16"
    )
    running.add_argument("--corpus", default=CORPUS, help="as the recipes name them")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, or print the tables."""
    arguments = parsed(argv)
    command.execute(
        arguments,
        ARMS,
        REFERENCE,
        lambda: (cells(arguments), train),
        figure=draw,
        overview=overview,
    )


if __name__ == "__main__":
    main()
