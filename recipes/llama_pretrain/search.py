"""Find each optimizer's best learning rate, then compare them over several seeds.

In: ``python search.py configs/tiny.yaml [--muon RATE ...] [--adamw RATE ...] [--jobs 2]
[--final-seeds 3] [--record] [-- RUN OPTIONS]``.
Out: ``search.json`` with every run, a table, the figure, and with ``--record`` the best rates in
``configs/best/``. Every optimizer begins with as many rates as the others; a grid whose best rate
lies at its edge is widened by a factor of 2 until it does not. Finished runs are kept, so it can be
interrupted.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import figure
import yaml
from compare import title as title_of
from launch import Run, run_all
from rich.console import Console
from rich.table import Table
from settings import HERE
from shared.arguments import RecipeError, find_config
from shared.measure import write_json
from shared.study import beyond_edge, claim_folder, mean_and_spread, split_extra

OPTIMIZERS: dict[str, dict[str, str]] = {
    "muon": {"optim": "muon", "optim_args": "order=pre_polar"},
    "adamw": {"optim": "adamw_torch_fused", "optim_args": ""},
}
GRIDS: dict[str, tuple[float, ...]] = {
    "muon": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
WIDEN_AT_MOST = 4

Results = dict[str, Any]


class Search:
    """The runs of one configuration, by optimizer, learning rate and seed."""

    def __init__(self, config: Path, out: Path, jobs: int, extra: Sequence[str]) -> None:
        self.config, self.out, self.jobs, self.extra = config, out, jobs, extra

    def run(self, optimizer: str, rate: float, seed: int) -> Run:
        """Return one run of the search."""
        options = OPTIMIZERS[optimizer] | {"learning_rate": f"{rate:g}", "seed": str(seed)}
        folder = self.out / f"{optimizer}_lr{rate:g}_seed{seed}"
        return Run(folder, str(self.config), options, self.extra)

    def losses(self, points: Sequence[tuple[str, float]], seeds: Sequence[int]) -> list[float]:
        """Run what is missing; return each point's mean validation loss over the seeds."""
        runs = [self.run(optimizer, rate, seed) for optimizer, rate in points for seed in seeds]
        run_all(runs, self.jobs, "training runs")
        return [
            statistics.fmean(final_loss(self.run(*point, seed)) for seed in seeds)
            for point in points
        ]


def final_loss(run: Run) -> float:
    """Return a finished run's validation loss; a run that diverged counts as infinite."""
    loss = run.results()["final_validation_loss"]
    return loss if math.isfinite(loss) else math.inf


def main() -> None:
    """Search the rates, then run the final seeds."""
    arguments = command_line()
    config = find_config(arguments.config, HERE)
    out = arguments.out or Path("runs/llama_pretrain") / f"{config.stem}_search"
    claim_folder(out, config, arguments.extra)
    search = Search(config, out, arguments.jobs, arguments.extra)
    grids = search_grids(
        search, {name: getattr(arguments, name) for name in OPTIMIZERS}, arguments.seeds
    )
    best = {name: min(grid, key=grid.__getitem__) for name, grid in grids.items()}
    report = {
        "command": command(),
        "config": config.name,
        "search_seeds": arguments.seeds,
        "grids": {
            name: {f"{rate:g}": loss for rate, loss in grid.items()} for name, grid in grids.items()
        },
        "best": best,
    }
    Console().print(grid_table(grids, best))
    write_json(out / "search.json", report)
    if arguments.record:
        record(config, best)
    if arguments.final_seeds:
        report["final"] = final_comparison(search, best, arguments)
        write_json(out / "search.json", report)
    print(f"All runs: {out / 'search.json'}")


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


def search_grids(
    search: Search, rates: Mapping[str, Sequence[float]], seeds: Sequence[int]
) -> dict[str, dict[float, float]]:
    """Return the loss of every rate of every optimizer, widened until no best is at an edge."""
    grids: dict[str, dict[float, float]] = {name: {} for name in rates}
    todo = [(name, rate) for name, grid in rates.items() for rate in grid]
    for _ in range(1 + WIDEN_AT_MOST):
        for (name, rate), loss in zip(todo, search.losses(todo, seeds), strict=True):
            grids[name][rate] = loss
        todo = [(name, rate) for name, grid in grids.items() for rate in beyond_edge(grid)]
        if not todo:
            return grids
    raise RecipeError(f"After {WIDEN_AT_MOST} wider grids a best rate is still at an edge: {grids}")


def grid_table(grids: Mapping[str, Mapping[float, float]], best: Mapping[str, float]) -> Table:
    """Return the table of validation losses, optimizers by rates, with the best of each bold."""
    rates = sorted({rate for grid in grids.values() for rate in grid})
    table = Table("optimizer", *(f"{rate:g}" for rate in rates), title="validation loss by rate")
    for name, grid in grids.items():
        cells = [f"{grid[rate]:.4f}" if rate in grid else "" for rate in rates]
        bold = [
            f"[bold]{cell}[/bold]" if rate == best[name] else cell
            for rate, cell in zip(rates, cells, strict=True)
        ]
        table.add_row(name, *bold)
    return table


def record(config: Path, best: Mapping[str, float]) -> None:
    """Write the best rates where ``compare.py`` and the quickstart read them."""
    path = HERE / "configs" / "best" / config.name
    path.parent.mkdir(exist_ok=True)
    options = {name: OPTIMIZERS[name] | {"learning_rate": best[name]} for name in OPTIMIZERS}
    head = f"# The best learning rate of each optimizer, written by\n#   {command()}\n"
    path.write_text(head + yaml.safe_dump(options, sort_keys=False), encoding="utf8")


def final_comparison(
    search: Search, best: Mapping[str, float], arguments: argparse.Namespace
) -> Results:
    """Run each optimizer at its best rate on seeds that the search has not seen."""
    first = max(arguments.seeds) + 1
    seeds = list(range(first, first + arguments.final_seeds))
    search.losses(list(best.items()), seeds)
    runs = {name: [search.run(name, rate, seed) for seed in seeds] for name, rate in best.items()}
    contents = {name: [run.results() for run in group] for name, group in runs.items()}
    losses = {name: mean_and_spread([final_loss(run) for run in runs[name]]) for name in runs}
    pairs = zip(contents["muon"], contents["adamw"], strict=True)
    ratios = [tokens_to_reach(muon, adamw) for muon, adamw in pairs]
    final = {"seeds": seeds, "losses": losses, "token_ratios": ratios}
    Console().print(final_table(final, best))
    shown = {name: group[0] for name, group in contents.items()}
    figure.loss_figure(shown, search.out / "comparison.png", title_of(shown))
    return final


def tokens_to_reach(run: Results, reference: Results) -> float | None:
    """Return the share of the reference's tokens after which ``run`` has its final loss.

    Both losses are those of the evaluation curve, between whose points the run is interpolated
    linearly. None when the run never gets there.
    """
    goal = reference["eval_curve"][-1]["loss"]
    curve = run["eval_curve"]
    for before, after in pairwise(curve):
        if after["loss"] <= goal:
            part = (before["loss"] - goal) / (before["loss"] - after["loss"])
            tokens = before["tokens"] + part * (after["tokens"] - before["tokens"])
            return tokens / reference["tokens"]
    return None


def final_table(final: Results, best: Mapping[str, float]) -> Table:
    """Return the table of the final comparison."""
    reached = [ratio for ratio in final["token_ratios"] if ratio is not None]
    never = len(final["token_ratios"]) - len(reached)
    caption = f"tokens muon needs to reach adamw's final loss: {share(reached)}"
    caption += f"; {never} seeds never do" if never else ""
    table = Table(
        "optimizer",
        "learning rate",
        "validation loss",
        title=f"seeds {final['seeds']}",
        caption=caption,
        caption_justify="left",
    )
    for name, loss in final["losses"].items():
        spread = "" if loss["spread"] is None else f" ± {loss['spread']:.4f}"
        table.add_row(name, f"{best[name]:g}", f"{loss['mean']:.4f}{spread}")
    return table


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
