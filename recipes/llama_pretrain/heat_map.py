"""The validation loss over momentum, learning rate and batch, as a heat map.

In: ``python heat_map.py configs/tiny.yaml [--momenta 0.9 0.95 0.98] [--rates 0.004 0.008 0.016
0.032] [--batches 1024 4096 16384] [--order pre_polar] [--jobs 2] [-- RUN OPTIONS]``.
Out: ``heat_map.json``, a table and ``heat_map.png``, one panel for each batch. All runs train on
the same number of tokens, so a larger batch takes fewer steps. Finished runs are kept: it can be
interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import matplotlib.pyplot as plt
import numpy as np
from launch import Run, run_all
from rich.console import Console
from rich.table import Table
from search import final_loss
from settings import HERE
from shared.arguments import RecipeError, find_config
from shared.measure import write_json
from shared.style import tidy
from study.folder import claim_folder, split_extra


class Point(NamedTuple):
    """The axes of the grid: tokens per step, momentum β, learning rate."""

    batch: int
    momentum: float
    rate: float


Losses = Mapping[Point, float]


def main() -> None:
    """Train at every point, then print and draw the losses."""
    arguments = command_line()
    config = find_config(arguments.config, HERE)
    out = arguments.out or Path("runs/llama_pretrain") / f"{config.stem}_heat_map"
    claim_folder(out, config, [arguments.order, *arguments.extra])
    axes = (arguments.batches, arguments.momenta, arguments.rates)
    points = [Point(*values) for values in itertools.product(*map(dict.fromkeys, axes))]
    runs = [run_at(point, config, out, arguments) for point in points]
    run_all(runs, arguments.jobs, "training runs")
    losses = dict(zip(points, map(final_loss, runs), strict=True))
    write_json(
        out / "heat_map.json",
        {
            "command": shlex.join(["python", "heat_map.py", *sys.argv[1:]]),
            "losses": [point._asdict() | {"loss": loss} for point, loss in losses.items()],
        },
    )
    Console().print(best_table(losses))
    draw(losses, out / "heat_map.png", arguments.order)
    print(f"All losses: {out / 'heat_map.json'}")
    print(f"Heat map: {out / 'heat_map.png'}")


def command_line() -> argparse.Namespace:
    """Return the parsed arguments; what follows ``--`` goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="configuration, e.g. configs/tiny.yaml")
    parser.add_argument("--momenta", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2, 3.2e-2])
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens of a step"
    )
    parser.add_argument("--order", choices=["pre_polar", "post_polar"], default="pre_polar")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="folder of all runs")
    own, extra = split_extra(sys.argv[1:])
    arguments = parser.parse_args(own)
    arguments.extra = extra
    return arguments


def run_at(point: Point, config: Path, out: Path, arguments: argparse.Namespace) -> Run:
    """Return the training at one point of the grid."""
    options = {
        "optim": "muon",
        "optim_args": f"order={arguments.order},momentum={point.momentum:g}",
        "learning_rate": f"{point.rate:g}",
        "tokens_per_step": point.batch,
    }
    folder = f"batch{point.batch}_momentum{point.momentum:g}_lr{point.rate:g}"
    return Run(out / folder, str(config), options, arguments.extra)


def best_table(losses: Losses) -> Table:
    """Return the best learning rate for each batch and momentum, the best of a batch in bold."""
    table = Table("tokens per step", "momentum", "best learning rate", "validation loss")
    for batch, points in itertools.groupby(losses, key=lambda point: point.batch):
        rows = [
            min(group, key=losses.__getitem__)
            for _, group in itertools.groupby(points, key=lambda point: point.momentum)
        ]
        best = min(rows, key=losses.__getitem__)
        for point in rows:
            style = "bold" if point == best else None
            cells = (f"{batch:,}", f"{point.momentum:g}", f"{point.rate:g}", shown(losses[point]))
            table.add_row(*cells, style=style)
    return table


def shown(loss: float) -> str:
    """Return a loss as the table and the figure print it."""
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def draw(losses: Losses, path: Path, order: str) -> None:
    """Draw one panel per batch, each with its own color scale; its best point is framed."""
    batches, momenta, rates = (list(dict.fromkeys(values)) for values in zip(*losses, strict=True))
    figure, panels = plt.subplots(
        1, len(batches), figsize=(3.4 * len(batches), 0.75 * len(momenta) + 1.4),
        dpi=160, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, batch in zip(panels[0], batches, strict=True):
        grid = np.array([[losses[Point(batch, m, r)] for r in rates] for m in momenta])
        # Diverged runs have no color; a grid on which nothing trained is empty.
        axes.imshow(np.ma.masked_invalid(grid), cmap="viridis_r", aspect="auto")
        write_cells(axes, grid)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(momenta)), [f"{momentum:g}" for momentum in momenta])
        tidy(axes, "learning rate", "", f"{batch:,} tokens per step")
        axes.grid(False)
    panels[0][0].set_ylabel("momentum β")
    figure.suptitle(f"validation loss, {order}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def write_cells(axes: plt.Axes, grid: np.ndarray) -> None:
    """Write each loss into its cell, and frame the smallest."""
    best = np.unravel_index(np.argmin(grid), grid.shape)
    for (row, column), loss in np.ndenumerate(grid):
        weight = "bold" if (row, column) == best else "normal"
        axes.text(
            column,
            row,
            shown(loss),
            ha="center",
            va="center",
            fontsize=9,
            weight=weight,
            color="white",
            bbox={"boxstyle": "round,pad=0.15", "fc": "#00000055", "ec": "none"},
        )
    row, column = (int(index) for index in best)
    axes.add_patch(
        plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2)
    )


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, RuntimeError) as error:
        sys.exit(f"error: {error}")
