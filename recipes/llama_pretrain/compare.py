"""Train each optimizer at its best known learning rate on the same tokens, and compare.

In: ``python compare.py configs/tiny.yaml`` (rates from ``configs/best/tiny.yaml``, which
``search.py`` wrote), or ``python compare.py --runs FOLDER FOLDER ...`` for finished runs.
Out: a table, and the figure of the loss curves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import figure
import yaml
from launch import Run, run_side_by_side
from rich.console import Console
from rich.table import Table
from settings import HERE
from shared.arguments import RecipeError, find_config
from study.folder import split_extra


def main() -> None:
    """Train or collect the runs, then print the table and draw the figure."""
    arguments = command_line()
    if arguments.runs:
        runs = {folder.name: read_results(folder) for folder in arguments.runs}
        out = arguments.out or Path("runs/llama_pretrain")
    else:
        config = find_config(arguments.config, HERE)
        out = arguments.out or Path("runs/llama_pretrain") / f"{config.stem}_compare"
        runs = train_each(config, out, arguments.extra)
    out.mkdir(parents=True, exist_ok=True)
    Console().print(comparison(runs))
    path = out / "comparison.png"
    figure.loss_figure(runs, path, title(runs))
    print(f"Loss curves: {path}")


def command_line() -> argparse.Namespace:
    """Return the parsed arguments; what follows ``--`` goes to every training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", help="configuration, e.g. configs/tiny.yaml")
    parser.add_argument("--runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, help="folder for the runs and the figure")
    own, extra = split_extra(sys.argv[1:])
    arguments = parser.parse_args(own)
    arguments.extra = extra
    if (arguments.config is None) == (arguments.runs is None):
        parser.error("give either a configuration or --runs with the folders of finished runs")
    return arguments


def best_options(config: Path) -> dict[str, dict[str, Any]]:
    """Return the options of each optimizer that the search recorded for a configuration."""
    path = HERE / "configs" / "best" / config.name
    if not path.is_file():
        raise RecipeError(
            f"No best learning rates are recorded for {config.name} ({path}). Find them with "
            f"`python {HERE / 'search.py'} {config} --record`."
        )
    return yaml.safe_load(path.read_text(encoding="utf8"))


def train_each(config: Path, out: Path, extra: list[str]) -> dict[str, dict[str, Any]]:
    """Train with each optimizer on the same tokens, side by side, and return their results."""
    runs = {
        label: Run(out / label, str(config), options, extra)
        for label, options in best_options(config).items()
    }
    run_side_by_side(runs)
    return {label: read_results(run.folder) for label, run in runs.items()}


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a finished run."""
    path = folder / "results.json"
    if not path.is_file():
        raise RecipeError(f"{folder} holds no results.json: the run there is not finished.")
    return json.loads(path.read_text(encoding="utf8"))


def comparison(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of all runs; the step share is the optimizer's part of the step time."""
    table = Table(title=title(runs), title_justify="left", title_style="bold")
    headings = ("rate", "validation loss", "tokens/s", "step share", "state MB")
    table.add_column("optimizer", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for label, run in runs.items():
        table.add_row(
            label,
            f"{run['learning_rate']:g}",
            f"{run['final_validation_loss']:.4f}",
            shown(run["tokens_per_second"], "{:,.0f}"),
            shown(run["optimizer_share"], "{:.1%}"),
            f"{run['optimizer_state_bytes'] / 1e6:.1f}",
        )
    return table


def shown(value: float | None, form: str) -> str:
    """Return a formatted number, or a dash where nothing was measured."""
    return "–" if value is None else form.format(value)


def title(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the runs have in common."""
    run = next(iter(runs.values()))
    parameters = run["model"]["parameters"] / 1e6
    return f"LLaMA {parameters:.1f}M, {run['data']['corpus']}, {run['tokens'] / 1e6:.2f}M tokens"


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, RuntimeError) as error:
        sys.exit(f"error: {error}")
