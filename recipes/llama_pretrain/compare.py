"""Train each optimizer at its best known learning rate on the same tokens, and compare.

In: ``python compare.py configs/tiny.yaml`` (rates from ``configs/best/tiny.yaml``, which
``search.py`` wrote), or ``python compare.py --runs FOLDER FOLDER ...`` for finished runs.
Out: a table, a sentence that concludes it, the figure of the loss curves, and a page with both.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import figure
import yaml
from conclusion import NAMES, caveat, conclusion
from launch import Run, run_side_by_side
from rich.console import Console
from rich.table import Table
from sample import Sample
from sample import shown as shown_sample
from settings import HERE
from shared.arguments import RecipeError, find_config
from study.folder import split_extra

from hf_muon.commands.board import write_board
from hf_muon.shown import count

WIDTH = 96


def main() -> None:
    """Train or collect the runs, then print the table and draw the figure."""
    arguments = command_line()
    if arguments.runs:
        folders = {folder.name: folder for folder in arguments.runs}
        runs = {label: read_results(folder) for label, folder in folders.items()}
        out = arguments.out or Path("runs/llama_pretrain")
    else:
        config = find_config(arguments.config, HERE)
        out = arguments.out or Path("runs/llama_pretrain") / f"{config.stem}_compare"
        runs = train_each(config, out, arguments.extra)
        folders = {label: out / label for label in runs}
    report(runs, folders, out)


def report(runs: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path], out: Path) -> None:
    """Print samples, the table and the conclusion; write the figure and the page."""
    for label, run in runs.items():
        if run.get("sample"):
            print(shown_sample(Sample(**run["sample"]), NAMES.get(label, label)), end="\n\n")
    Console().print(comparison(runs))
    found = conclusion(runs)
    if found:
        print("", *(textwrap.fill(text, WIDTH) for text in (found, caveat(runs))), "", sep="\n")
    path = out / "comparison.png"
    out.mkdir(parents=True, exist_ok=True)
    figure.loss_figure(runs, path, title(runs))
    said = f"{found} {caveat(runs)}" if found else ""
    page = write_board(
        list(folders.values()), out / "board.html", title=title(runs), conclusion=said
    )
    print(f"Loss curves: {path}\nPage with curves, settings and costs: {page}")


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
    headings = (
        "rate", "others", "validation", "tokens/s", "step share", "state MB",
    )  # fmt: skip
    table.add_column("optimizer", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for label, run in runs.items():
        table.add_row(
            label,
            f"{run['learning_rate']:g}",
            f"{other_rate(run):g}",
            f"{run['final_validation_loss']:.4f}",
            shown(run["tokens_per_second"], "{:,.0f}"),
            shown(run["optimizer_share"], "{:.1%}"),
            f"{run['optimizer_state_bytes'] / 1e6:.1f}",
        )
    return table


def other_rate(run: Mapping[str, Any]) -> float:
    """Return the rate of embeddings, head and norms; the matrices' rate if the run has only one."""
    other = run.get("other_learning_rate")
    return run["learning_rate"] if other is None else other


def shown(value: float | None, form: str) -> str:
    """Return a formatted number, or a dash where nothing was measured."""
    return "–" if value is None else form.format(value)


def title(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the runs have in common."""
    run = next(iter(runs.values()))
    parameters, tokens = count(run["model"]["parameters"]), count(run["tokens"])
    return f"LLaMA of {parameters} parameters, {run['data']['corpus']}, {tokens} tokens"


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, RuntimeError) as error:
        sys.exit(f"error: {error}")
