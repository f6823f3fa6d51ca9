"""Compare AdamW, LoRA+ and the updates of Muon for adapters, each at its best learning rate.

In: ``python compare.py configs/minilm_sentiment.yaml [--methods adamw factor] [--ranks 8 4 16 64]
[--seeds 3 1] [-- RUN OPTIONS]``. Out: ``study.json`` with every run, a table and ``study.png``.

Seed 0 searches the rates, a factor of 2 apart and wider until the best is not at an edge; ranks
after the first start from its best rate and the neighbours of that. The two best rates go on to the
other seeds, and the better mean counts. All runs take equal steps. Finished runs are kept, so a
study can be interrupted and grown.
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
from study.descent import FACTOR, beyond_edge
from study.folder import claim_folder, split_extra
from study.paired import mean_and_spread

Results = dict[str, Any]

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
FINALISTS = 2


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
            results = run.main([str(self.config), *words, *output, *self.extra])
        except FloatingPointError as error:
            lost = {"validation_loss": math.inf, "validation_accuracy": 0.0, "lost": str(error)}
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, lost)
            return lost
        if results is None:
            raise RecipeError(f"The study was stopped by a signal during {folder.name}.")
        return results

    def loss(self, method: str, rank: int, rate: float, seed: int = 0) -> float:
        """Return a run's validation loss; a run that diverged counts as infinite."""
        loss = self.result(method, rank, rate, seed)["validation_loss"]
        return loss if math.isfinite(loss) else math.inf

    def search(self, method: str, rank: int, rates: Sequence[float]) -> list[float]:
        """Return these rates and more, until the best of seed 0 is not at an edge."""
        grid = {rate: self.loss(method, rank, rate) for rate in rates}
        for _ in range(WIDEN_AT_MOST):
            beyond = beyond_edge(grid)
            if not beyond:
                return sorted(grid)
            grid |= {rate: self.loss(method, rank, rate) for rate in beyond}
        raise RecipeError(f"{method}: after {WIDEN_AT_MOST} more rates the best is at an edge.")

    def compared(self, method: str, rank: int, rates: Sequence[float], seeds: int) -> Results:
        """Return loss and accuracy at every rate, over all seeds at the two best of seed 0."""
        ordered = sorted(rates, key=lambda rate: self.loss(method, rank, rate))
        over = {rate: seeds if rate in ordered[:FINALISTS] else 1 for rate in sorted(rates)}
        at = {rate: self.over_seeds(method, rank, rate, count) for rate, count in over.items()}
        best = min(ordered[:FINALISTS], key=lambda rate: at[rate]["loss"]["mean"])
        return {"rates": at, "best": best}

    def over_seeds(self, method: str, rank: int, rate: float, seeds: int) -> Results:
        """Return loss and accuracy over the first seeds."""
        runs = [self.result(method, rank, rate, seed) for seed in range(seeds)]
        losses = [self.loss(method, rank, rate, seed) for seed in range(seeds)]
        accuracies = [run["validation_accuracy"] for run in runs]
        return {"loss": mean_and_spread(losses), "accuracy": mean_and_spread(accuracies)}


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
    for rank, seeds in zip(arguments.ranks, arguments.seeds, strict=True):
        report["ranks"][rank] = of_rank(study, rank, seeds, arguments, report)
        write_json(out / "study.json", report)
        figure.study_figure(report, out / "study.png")
    Console().print(table(report))
    print(f"All runs: {out / 'study.json'}; figure: {out / 'study.png'}")
    return report


def command_line(argv: list[str]) -> argparse.Namespace:
    """Return the parsed arguments; what follows ``--`` goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="configuration, e.g. configs/minilm_sentiment.yaml")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[8, 4, 16, 64], help="the first is searched first"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[3], help="seeds at the best rates of each rank"
    )
    parser.add_argument("--out", type=Path, help="folder of all runs")
    own, extra = split_extra(argv)
    arguments = parser.parse_args(own)
    arguments.extra = extra
    if len(arguments.seeds) > len(arguments.ranks):
        parser.error("--seeds takes at most one number per rank; the last holds for the rest")
    arguments.seeds += arguments.seeds[-1:] * (len(arguments.ranks) - len(arguments.seeds))
    return arguments


def of_rank(
    study: Study, rank: int, seeds: int, arguments: argparse.Namespace, report: Results
) -> Results:
    """Return what every method reaches at a rank, by learning rate."""
    results: Results = {}
    for method in arguments.methods:
        rates: Sequence[float] = FIRST_RATES[method]
        if rank != arguments.ranks[0]:
            best = report["ranks"][arguments.ranks[0]][method]["best"]
            rates = (best / FACTOR, best, best * FACTOR)
        rates = study.search(method, rank, rates)
        results[method] = study.compared(method, rank, rates, seeds)
    return results


def table(report: Results) -> Table:
    """Return loss and accuracy at every rank, method and rate: mean ± standard deviation."""
    shown = Table("rank", "method", "learning rate", "seeds", "validation loss", "accuracy")
    for rank, methods in report["ranks"].items():
        for method, part in methods.items():
            for rate, at in part["rates"].items():
                loss, accuracy = with_spread(at["loss"]), with_spread(at["accuracy"])
                style = "bold" if rate == part["best"] else None
                seeds = str(len(at["loss"]["values"]))
                shown.add_row(str(rank), method, f"{rate:g}", seeds, loss, accuracy, style=style)
            shown.add_section()
    return shown


def with_spread(value: Results) -> str:
    """Return ``mean ± spread``."""
    spread = "" if value["spread"] is None else f" ± {value['spread']:.4f}"
    return f"{value['mean']:.4f}{spread}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
