"""Compare AdamW, LoRA+ and the updates of Muon for adapters, each at its best learning rate.

In: ``python compare.py configs/minilm_sentiment.yaml [--methods adamw factor] [--ranks 8 4 16 64]
[--seeds 3] [-- RUN OPTIONS]``. Out: ``study.json`` with every run, tables and ``study.png``. The
rate is searched at the first rank with seed 0, a factor of 2 apart and wider until the best is not
at an edge; the other ranks try that rate and its neighbours. The seeds that are reported are
others. All runs take equal steps. Finished runs are kept, so a study can be interrupted and grown.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import figure
import run
from rich.console import Console
from rich.table import Table
from settings import HERE
from shared.arguments import RecipeError, find_config
from shared.measure import write_json
from shared.study import FACTOR, beyond_edge, claim_folder, mean_and_spread, split_extra

Results = dict[str, Any]
Grid = dict[float, float]  # validation loss by learning rate

METHODS: dict[str, dict[str, str]] = {
    "adamw": {"optim": "adamw_torch"},
    "loraplus": {"optim": "adamw_torch", "loraplus_ratio": "16"},
    "factor": {"optim": "muon", "optim_args": "lora_update=factor"},
    "product": {"optim": "muon", "optim_args": "lora_update=product"},
    "tangent": {"optim": "muon", "optim_args": "lora_update=tangent"},
}
"""Options of each method; 16 is the ratio that the LoRA+ paper (arXiv 2402.12354) recommends."""

FIRST_RATES: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "loraplus": (2.5e-4, 5e-4, 1e-3),
    "factor": (2e-3, 4e-3, 8e-3),
    "product": (2e-3, 4e-3, 8e-3),
    "tangent": (2e-3, 4e-3, 8e-3),
}
WIDEN_AT_MOST = 5


class Study:
    """The runs of one configuration, by method, rank, learning rate and seed."""

    def __init__(self, config: Path, out: Path, extra: Sequence[str]) -> None:
        self.config, self.out, self.extra = config, out, extra

    def result(self, method: str, rank: int, rate: float, seed: int) -> Results:
        """Return a run's results, training only when there are none yet."""
        folder = self.out / f"{method}_r{rank}_lr{rate:g}_seed{seed}"
        path = folder / "results.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf8"))
        options = METHODS[method] | {"r": rank, "learning_rate": f"{rate:g}", "seed": seed}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        print(f"{method}, rank {rank}, learning rate {rate:g}, seed {seed}", flush=True)
        output = ["--output_dir", str(folder), "--disable_tqdm", "true", "--logging_steps", "0.5"]
        try:
            return run.main([str(self.config), *words, *output, *self.extra])
        except FloatingPointError as error:
            lost = {"validation_loss": math.inf, "validation_accuracy": 0.0, "lost": str(error)}
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, lost)
            return lost

    def loss(self, method: str, rank: int, rate: float, seed: int) -> float:
        """Return a run's validation loss; a run that diverged counts as infinite."""
        loss = self.result(method, rank, rate, seed)["validation_loss"]
        return loss if math.isfinite(loss) else math.inf

    def search(self, method: str, rank: int, rates: Sequence[float]) -> Grid:
        """Return the loss of seed 0 at every rate."""
        return {rate: self.loss(method, rank, rate, 0) for rate in rates}

    def wide_search(self, method: str, rank: int) -> Grid:
        """Return the losses of a grid that is widened until its best is not at an edge."""
        grid = self.search(method, rank, FIRST_RATES[method])
        for _ in range(WIDEN_AT_MOST):
            beyond = beyond_edge(grid)
            if not beyond:
                return grid
            grid |= self.search(method, rank, beyond)
        raise RecipeError(f"{method}: after {WIDEN_AT_MOST} more rates the best is at an edge.")

    def final(self, method: str, rank: int, rate: float, seeds: int) -> Results:
        """Return loss and accuracy over seeds that no search has seen, 1 and up."""
        runs = [self.result(method, rank, rate, seed) for seed in range(1, seeds + 1)]
        return {
            "learning_rate": rate,
            "loss": mean_and_spread([each["validation_loss"] for each in runs]),
            "accuracy": mean_and_spread([each["validation_accuracy"] for each in runs]),
        }


def main(argv: list[str]) -> Results:
    """Run what is missing, rank by rank; write the report after each, then show it."""
    arguments = command_line(argv)
    config = find_config(arguments.config, HERE)
    out = arguments.out or Path("runs/lora_finetune") / f"{config.stem}_study"
    claim_folder(out, config, arguments.extra)
    study = Study(config, out, arguments.extra)
    report: Results = {
        "command": shlex.join(["python", "compare.py", *argv]),
        "config": config.name,
        "ranks": {},
    }
    for rank in arguments.ranks:
        report["ranks"][rank] = of_rank(study, rank, arguments, report)
        write_json(out / "study.json", report)
    figure.study_figure(report, out / "study.png")
    console = Console()
    console.print(grid_table(report, arguments.ranks[0]))
    console.print(final_table(report))
    print(f"All runs: {out / 'study.json'}; figure: {out / 'study.png'}")
    return report


def command_line(argv: list[str]) -> argparse.Namespace:
    """Return the parsed arguments; what follows ``--`` goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="configuration, e.g. configs/minilm_sentiment.yaml")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[8, 4, 16, 64], help="the first is searched widely"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best rates, 1 and up")
    parser.add_argument("--out", type=Path, help="folder of all runs")
    own, extra = split_extra(argv)
    arguments = parser.parse_args(own)
    arguments.extra = extra
    return arguments


def of_rank(study: Study, rank: int, arguments: argparse.Namespace, report: Results) -> Results:
    """Return the grids of a rank, and every method over the seeds at its best rate."""
    grids: dict[str, Grid] = {}
    for method in arguments.methods:
        if rank == arguments.ranks[0]:
            grids[method] = study.wide_search(method, rank)
        else:
            best = report["ranks"][arguments.ranks[0]]["final"][method]["learning_rate"]
            grids[method] = study.search(method, rank, (best / FACTOR, best, best * FACTOR))
    final = {
        method: study.final(method, rank, min(grid, key=grid.__getitem__), arguments.seeds)
        for method, grid in grids.items()
    }
    return {"grids": grids, "final": final}


def grid_table(report: Results, rank: int) -> Table:
    """Return the validation losses of the search, methods by rates, with the best of each bold."""
    grids = report["ranks"][rank]["grids"]
    rates = sorted({rate for grid in grids.values() for rate in grid})
    table = Table(
        "", *(f"{rate:g}" for rate in rates), title=f"validation loss by learning rate, rank {rank}"
    )
    for method, grid in grids.items():
        best = min(grid, key=grid.__getitem__)
        cells = [f"{grid[rate]:.4f}" if rate in grid else "" for rate in rates]
        bold = [
            f"[bold]{cell}[/bold]" if rate == best else cell
            for rate, cell in zip(rates, cells, strict=True)
        ]
        table.add_row(method, *bold)
    return table


def final_table(report: Results) -> Table:
    """Return loss and accuracy of every method and rank, mean ± standard deviation."""
    table = Table("rank", "method", "learning rate", "validation loss", "accuracy")
    for rank, part in report["ranks"].items():
        for method, final in part["final"].items():
            loss, accuracy = (with_spread(final[key]) for key in ("loss", "accuracy"))
            table.add_row(str(rank), method, f"{final['learning_rate']:g}", loss, accuracy)
        table.add_section()
    return table


def with_spread(value: Results) -> str:
    """Return ``mean ± spread``."""
    spread = "" if value["spread"] is None else f" ± {value['spread']:.4f}"
    return f"{value['mean']:.4f}{spread}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
