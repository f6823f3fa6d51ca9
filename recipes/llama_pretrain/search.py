"""Find each optimizer's best learning rates, then compare them over several seeds.

In: ``python search.py configs/tiny.yaml [--muon RATE ...] [--adamw RATE ...] [--jobs 2]
[--budget 24] [--final-seeds 3] [--record] [-- RUN OPTIONS]``.
Out: ``search.jsonl`` with every run, a table, the figures, and with ``--record`` the best rates in
``configs/best/``. Each optimizer has one rate for the hidden matrices and one for embeddings, head
and norms. Both rates start equal, from equally many starting points per optimizer, and are then
searched by coordinate descent. Finished runs are kept, so the search can be interrupted.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared and recipes/study

import figure
import yaml
from compare import title as title_of
from conclusion import tokens_to_reach
from launch import Run, run_quietly
from settings import HERE
from shared.arguments import RecipeError, find_config
from study import figures, records, tables
from study.folder import claim_folder, split_extra
from study.harness import Arm, Plan, study

OPTIMIZERS: dict[str, dict[str, str]] = {
    "muon": {"optim": "muon", "optim_args": "order=pre_polar"},
    "adamw": {"optim": "adamw_torch_fused", "optim_args": ""},
}
GRIDS: dict[str, tuple[float, ...]] = {
    "muon": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
BUDGET = 24
REFERENCE = "adamw"

Results = dict[str, Any]


@dataclass(frozen=True)
class Trainings:
    """The trainings of one configuration: each a process and a folder of its own."""

    config: Path
    out: Path
    extra: Sequence[str]

    def __call__(self, run: records.Run) -> Results:
        """Train, unless it was done before, and return what the harness keeps."""
        training = self.of(run)
        if training.results() is None:
            run_quietly(training)
        found = training.results()
        return {"loss": finite(final_loss(training)), "seconds": found.get("wall_seconds", 0.0)}

    def of(self, run: records.Run) -> Run:
        """Return the training of a run; its folder is named after what sets it apart."""
        rate, other = run.point["learning_rate"], run.point["other_learning_rate"]
        options = {**run.settings, "learning_rate": f"{rate:g}", "seed": str(run.seed)}
        second = ""
        if other != rate:
            options["other_learning_rate"], second = f"{other:g}", f"_other{other:g}"
        folder = self.out / f"{run.arm}_lr{rate:g}{second}_seed{run.seed}"
        return Run(folder, str(self.config), options, self.extra)


def final_loss(run: Run) -> float:
    """Return a finished run's validation loss; a run that diverged counts as infinite."""
    loss = run.results()["final_validation_loss"]
    return loss if math.isfinite(loss) else math.inf


def finite(loss: float) -> float | None:
    """Return a loss, or None if it is not finite, because JSON has no such numbers."""
    return loss if math.isfinite(loss) else None


def main() -> None:
    """Search the rates, then run the final seeds."""
    arguments = command_line()
    config = find_config(arguments.config, HERE)
    out = arguments.out or Path("runs/llama_pretrain") / f"{config.stem}_search"
    claim_folder(out, config, arguments.extra)
    train = Trainings(config, out, arguments.extra)
    plans = plans_of(config, arguments)
    found = records.Records(out / "search.jsonl")
    study(found, plans, train, arguments.jobs)
    report = summary(found, plans)
    (out / "search.md").write_text(f"`{command()}`\n\n{report}\n", encoding="utf8")
    print(report)
    if arguments.record:
        record(config, {plan.name: plan.run(plan.best(found), 0).point for plan in plans})
    if arguments.final_seeds:
        compared(found, plans, train, out)
    print(f"All runs: {out / 'search.jsonl'}")


def command_line() -> argparse.Namespace:
    """Return the parsed arguments; what follows ``--`` goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="configuration, e.g. configs/tiny.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the search")
    parser.add_argument(
        "--final-seeds", type=int, default=0, help="number of fresh seeds to compare the best on"
    )
    rates = {"type": float, "nargs": "+", "metavar": "RATE"}
    parser.add_argument("--muon", default=GRIDS["muon"], help="first rates of Muon", **rates)
    parser.add_argument("--adamw", default=GRIDS["adamw"], help="first rates of AdamW", **rates)
    parser.add_argument(
        "--budget", type=int, default=BUDGET, help="points that each optimizer's search may try"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="folder of all runs")
    parser.add_argument(
        "--record", action="store_true", help="write the best rates to configs/best/"
    )
    own, extra = split_extra(sys.argv[1:])
    arguments = parser.parse_args(own)
    arguments.extra = extra
    counts = {name: len(getattr(arguments, name)) for name in OPTIMIZERS}
    if len(set(counts.values())) > 1:
        parser.error(f"give every optimizer the same number of rates, not {counts}")
    return arguments


def command() -> str:
    """Return the command line as it was typed, from the recipe's folder."""
    return shlex.join(["python", "search.py", *sys.argv[1:]])


def plans_of(config: Path, arguments: argparse.Namespace) -> list[Plan]:
    """Return how each optimizer is searched, and the seeds that the search does not see."""
    first = max(arguments.seeds) + 1
    fresh = range(first, first + arguments.final_seeds)
    plans = []
    for name, options in OPTIMIZERS.items():
        grid = [both_at(rate) for rate in getattr(arguments, name)]
        arm = Arm(options, grid[0], dict.fromkeys(grid[0], 2.0), grid[1:])
        cell = {"config": config.name}
        plans.append(Plan(name, arm, cell, fresh, arguments.seeds, arguments.budget))
    return plans


def both_at(rate: float) -> dict[str, float]:
    """Return the point at which both rates are equal."""
    return {"learning_rate": rate, "other_learning_rate": rate}


def summary(found: records.Records, plans: Sequence[Plan]) -> str:
    """Return the losses of the search, the best point of each optimizer, and the fresh seeds."""
    rows = tables.rows(found, plans)
    lines = tables.table(rows, REFERENCE, tables.columns(REFERENCE))
    return "\n".join([*searched(rows), "", *lines, "", f"{tables.cost(found)}."])


def searched(rows: Sequence[tables.Row]) -> list[str]:
    """Return a table of the validation loss at every point; each optimizer's best is bold."""
    head = ["optimizer", "matrices", "embeddings, head, norms", "validation loss"]
    lines = [tables.cells(head), tables.cells(["---"] * len(head))]
    for row in rows:
        for point, loss in sorted(row.searched.items()):
            shown = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            bold = f"**{shown}**" if point == row.best else shown
            lines.append(tables.cells([row.plan.name, *(f"{rate:g}" for rate in point), bold]))
    return lines


def record(config: Path, best: Mapping[str, Mapping[str, float]]) -> None:
    """Write the best rates where ``compare.py`` and the quickstart read them."""
    path = HERE / "configs" / "best" / config.name
    path.parent.mkdir(exist_ok=True)
    options = {name: OPTIMIZERS[name] | dict(best[name]) for name in OPTIMIZERS}
    head = f"# The best learning rates of each optimizer, written by\n#   {command()}\n"
    path.write_text(head + yaml.safe_dump(options, sort_keys=False), encoding="utf8")


def compared(
    found: records.Records, plans: Sequence[Plan], train: Trainings, out: Path
) -> list[float | None]:
    """Plot both optimizers on the fresh seeds; print and return Muon's share of AdamW's tokens."""
    rows = tables.rows(found, plans)
    figures.draw(rows, REFERENCE, out / "seeds.png", plans[0].cell["config"])
    runs = {
        plan.name: [train.of(plan.run(plan.best(found), seed)).results() for seed in plan.seeds]
        for plan in plans
    }
    if any("diverged" in results for of_arm in runs.values() for results in of_arm):
        print("A seed diverged at its best rates: token shares are left out.")
        return []
    shown = {name: of_arm[0] for name, of_arm in runs.items()}
    figure.loss_figure(shown, out / "comparison.png", title_of(shown))
    shares = [tokens_to_reach(*pair) for pair in zip(runs["muon"], runs["adamw"], strict=True)]
    reached = [part for part in shares if part is not None]
    never = len(shares) - len(reached)
    print(
        f"Tokens muon needs to reach adamw's final loss: {share(reached)}"
        + (f"; {never} of {len(shares)} seeds never do" if never and reached else "")
    )
    return shares


def share(ratios: Sequence[float]) -> str:
    """Return mean and spread of ratios as percentages."""
    if not ratios:
        return "never"
    spread = f" ± {statistics.stdev(ratios):.1%}" if len(ratios) > 1 else ""
    return f"{statistics.fmean(ratios):.1%}{spread}"


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, RuntimeError) as error:
        sys.exit(f"error: {error}")
