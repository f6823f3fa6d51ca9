"""Compare AdamW, LoRA+ and Muon's updates for adapters, each at its own best learning rates.

In: ``python compare.py configs/minilm_sentiment.yaml [--methods adamw factor] [--ranks 8 4 16 64]
[--seeds 3 1] [--budget 12] [-- RUN OPTIONS]``. Out: ``study.jsonl`` with every run, ``study.json``,
tables in ``study.md`` and ``study.png``.

Each method has a rate for the adapters, one for the head, and the ratio of B's rate to A's where a
step moves them separately; LoRA+ has one rate and a fixed ratio. All are searched by coordinate
descent on seed 0; ranks after the first start at the first one's best rates. The
comparison uses seeds that the search has not seen. All runs take the same number of steps. Finished
runs are kept, so a study can be interrupted and extended.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared and recipes/study

import figure
import run
from settings import HERE
from shared.arguments import RecipeError, find_config
from shared.measure import write_json
from study import records, tables
from study.folder import claim_folder, split_extra
from study.harness import Arm, Plan, study
from study.paired import mean_and_spread

Results = dict[str, Any]

METHODS: dict[str, dict[str, str]] = {
    "adamw": {"optim": "adamw_torch"},
    "loraplus": {"optim": "adamw_torch", "loraplus_ratio": "16"},
    "factor": {"optim": "muon", "optim_args": "lora_update=factor"},
    "product": {"optim": "muon", "optim_args": "lora_update=product"},
    "tangent": {"optim": "muon", "optim_args": "lora_update=tangent"},
    "muon_on_b": {"optim": "muon", "optim_args": "adamw_params=lora_A"},
}
"""Options of each method; 16 is the ratio that the LoRA+ paper (arXiv 2402.12354) recommends."""

FACTOR_OF = {"adamw": "lora_B", "factor": "lora_B", "muon_on_b": "lora_A"}
"""Whose rate a method multiplies by a factor of its own: with ``muon_on_b``, A learns with the rate
of the head times the factor; else B learns with the rate of the adapters times it."""

FIRST_RATES: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "loraplus": (2.5e-4, 5e-4, 1e-3),
    "factor": (2e-3, 4e-3, 8e-3),
    "product": (2e-3, 4e-3, 8e-3),
    "tangent": (2e-3, 4e-3, 8e-3),
    "muon_on_b": (2e-3, 4e-3, 8e-3),
}
BUDGET = 16
REFERENCE = "adamw"


@dataclass(frozen=True)
class Trainings:
    """The trainings of one configuration, each in a folder of its own."""

    config: Path
    out: Path
    extra: Sequence[str]

    def __call__(self, one: records.Run) -> Results:
        """Train, unless it was done before, and return what the harness keeps."""
        found = self.result(one)
        loss = found["validation_loss"]
        return {
            "loss": loss if math.isfinite(loss) else None,
            "accuracy": found["validation_accuracy"],
            "seconds": found.get("wall_seconds", 0.0),
        }

    def result(self, one: records.Run) -> Results:
        """Return a run's results, training only when there are none yet."""
        rank, rate = one.cell["rank"], one.point["learning_rate"]
        other = one.point.get("other_learning_rate", rate)
        ratio = one.point.get("ratio", 1.0)
        second = ("" if other == rate else f"_other{other:g}") + f"_ratio{ratio:g}" * (ratio != 1)
        folder = self.out / f"{one.arm}_r{rank}_lr{rate:g}{second}_seed{one.seed}"
        path = folder / "results.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf8"))
        options = {**one.settings, "r": rank, "learning_rate": f"{rate:g}", "seed": one.seed}
        options |= {"other_learning_rate": f"{other:g}"} if other != rate else {}
        if ratio != 1:
            options["lr_multipliers"] = f"{FACTOR_OF[one.arm]}:{ratio:g}"
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
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


def main(argv: list[str]) -> Results:
    """Run what is missing, rank by rank; write the report after each, then show it."""
    arguments = command_line(argv)
    config = find_config(arguments.config, HERE)
    out = arguments.out or Path("runs/lora_finetune") / f"{config.stem}_study"
    claim_folder(out, config, arguments.extra)
    train, found = Trainings(config, out, arguments.extra), records.Records(out / "study.jsonl")
    report: Results = {
        "command": shlex.join(["python", "compare.py", *argv]),
        "config": config.name,
        "ranks": {},
    }
    starts, parts = {}, []
    for rank, seeds in zip(arguments.ranks, arguments.seeds, strict=True):
        plans = plans_at(rank, seeds, config, arguments, starts)
        study(found, plans, train)
        starts = starts or {plan.name: plan.run(plan.best(found), 0).point for plan in plans}
        rows = tables.rows(found, plans)
        report["ranks"][rank] = {row.plan.name: at_rates(row) for row in rows}
        parts.append("\n".join([f"**rank {rank}**", "", *table(rows)]))
        write_json(out / "study.json", report)
        (out / "study.md").write_text("\n\n".join(parts) + "\n", encoding="utf8")
        figure.study_figure(report, out / "study.png")
    print("\n\n".join(parts))
    print(f"All runs: {found.path}; tables: {out / 'study.md'}; figure: {out / 'study.png'}")
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
        "--seeds", nargs="+", type=int, default=[3], help="fresh seeds at the best rates of a rank"
    )
    parser.add_argument(
        "--budget", type=int, default=BUDGET, help="points that each method's search may try"
    )
    parser.add_argument("--out", type=Path, help="folder of all runs")
    own, extra = split_extra(argv)
    arguments = parser.parse_args(own)
    arguments.extra = extra
    if len(arguments.seeds) > len(arguments.ranks):
        parser.error("--seeds takes at most one number per rank; the last holds for the rest")
    arguments.seeds += arguments.seeds[-1:] * (len(arguments.ranks) - len(arguments.seeds))
    return arguments


def plans_at(
    rank: int,
    seeds: int,
    config: Path,
    arguments: argparse.Namespace,
    starts: Mapping[str, Mapping[str, float]],
) -> list[Plan]:
    """Return how each method is searched at a rank, from a grid or from its starting point."""
    plans = []
    for name in arguments.methods:
        grid = [starts[name]] if name in starts else [at_rate(name, r) for r in FIRST_RATES[name]]
        arm = Arm(METHODS[name], grid[0], dict.fromkeys(grid[0], 2.0), grid[1:])
        cell = {"config": config.name, "rank": rank}
        plans.append(Plan(name, arm, cell, range(1, seeds + 1), budget=arguments.budget))
    return plans


def at_rate(method: str, rate: float) -> dict[str, float]:
    """Return the point with one rate for A, B and the head; LoRA+ has only one."""
    if "loraplus_ratio" in METHODS[method]:
        return {"learning_rate": rate}
    ratio = {"ratio": 1.0} if method in FACTOR_OF else {}
    return {"learning_rate": rate, "other_learning_rate": rate, **ratio}


def at_rates(row: tables.Row) -> Results:
    """Return loss and accuracy for each rate of the adapters, with the best of everything else.

    At the best rate they come from the fresh seeds, at other rates from the search.
    """
    best, *others = row.best
    lines = {(*line["point"].values(), line["seed"]): line["found"] for line in row.lines}
    rates = {}
    for point in sorted(point for point in row.searched if [*point[1:]] == others):
        seeds = sorted(row.losses) if point == row.best and row.losses else [0]
        found = [lines[*point, seed] for seed in seeds]
        rates[point[0]] = {
            "loss": mean_and_spread([lost_is_infinite(each["loss"]) for each in found]),
            "accuracy": mean_and_spread([each["accuracy"] for each in found]),
        }
    return {"rates": rates, "best": best, "point": row.plan.run(row.best, 0).point}


def lost_is_infinite(loss: float | None) -> float:
    """Return a loss as a number; infinite if the run diverged."""
    return math.inf if loss is None else loss


def table(rows: Sequence[tables.Row]) -> list[str]:
    """Return the table of a rank, with the accuracy of the fresh seeds."""
    shown = tables.columns(REFERENCE)
    shown.insert(4, ("accuracy", lambda row, base: accuracy_text(row)))
    return tables.table(rows, REFERENCE, shown)


def accuracy_text(row: tables.Row) -> str:
    """Return mean ± standard deviation in percent."""
    part = at_rates(row)
    found = part["rates"][part["best"]]["accuracy"]
    spread = "" if found["spread"] is None else f" ± {found['spread']:.1%}"
    return f"{found['mean']:.1%}{spread}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
