"""``hf-muon report RUN``: one page about a run, or with ``--board`` one about several.

In: the output folder of a Trainer, with the files that it, hf_muon and the recipes write there.
Out: one HTML file with its figures inside. The page says what is missing and which files were
looked for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_muon.commands import page
from hf_muon.commands.board import write_board
from hf_muon.commands.curves import curves, svg
from hf_muon.commands.runs import NOT_RECORDED, REPORT, RESULTS, STATE, Run, read_run
from hf_muon.diagnostics.history import FILE_NAME
from hf_muon.diagnostics.plots import spectra_figure
from hf_muon.shown import count, megabytes, shape

NO_HISTORY = (
    f"Nothing was logged. Looked for {STATE}, here and in checkpoint-*, which the Trainer writes "
    f"with each checkpoint and in save_state(), and for a recipe's {RESULTS}."
)


def report(
    runs: Annotated[list[Path], typer.Argument(help="The output folder of a Trainer.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Default: report.html in the folder, or board.html, instead of an old one."
        ),
    ] = None,
    board: Annotated[
        bool,
        typer.Option(
            "--board", help="One page about several runs, or about all runs in the folders."
        ),
    ] = False,
    target: Annotated[
        float | None,
        typer.Option(help="--board: a loss. Default: the highest of the runs' last losses."),
    ] = None,
    watts_per_core: Annotated[
        float | None,
        typer.Option(help="--board: what a busy core draws, for an estimate where RAPL is not."),
    ] = None,
) -> None:
    """Write an HTML page about a run: losses, learning rates, spectra, routes."""
    if board:
        typer.echo(write_board(runs, output, target=target, watts_per_core=watts_per_core))
        return
    if target is not None or watts_per_core is not None:
        raise ValueError("--target and --watts-per-core are for --board.")
    if len(runs) > 1:
        raise ValueError(f"{len(runs)} runs are given: add --board for one page about all of them.")
    typer.echo(write_run_report(runs[0], output))


def write_run_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page about one run.

    Args:
        run: The ``output_dir`` of a Trainer.
        output: File to write. Default: ``report.html`` in the folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: The folder does not exist, or contains no file of a run.
        ImportError: matplotlib is not installed.
        ValueError: A file in it is damaged.
    """
    found = read_run(run)
    losses = curves(
        _named(found, {"loss": "training", "eval_loss": "validation"}), "loss", cut_begin=True
    )
    rates = curves(
        _named(found, {"learning_rate": "learning_rate", "adamw/lr": "adamw/lr"}), "learning rate"
    )
    missing = NO_HISTORY
    if found.has_history:
        missing = (
            f"Neither is there. Looked among {len(found.logged)} logged quantities for loss, "
            "eval_loss, learning_rate and adamw/lr."
        )
    parts = [
        page.facts(_summary(found)),
        page.section(
            "Losses and learning rates",
            page.figures([(losses, "The first tenth may lie above the frame."), (rates, "")]),
            missing,
        ),
        *_spectra(found),
        page.section(
            "Routes",
            _routes(found.routes),
            f"No {REPORT} with routes: another optimizer trained, or groups were made by hand.",
        ),
        page.section("Versions", page.table(["package", "version"], found.versions.items())),
    ]
    path = Path(output) if output else found.folder / "report.html"
    path.write_text(page.page(f"Run {found.name}", parts), encoding="utf-8")
    return path


def _named(run: Run, names: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Return logged values by their labels in a figure."""
    return {label: run.logged.get(name, []) for name, label in names.items()}


def _summary(run: Run) -> list[tuple[str, str]]:
    """Return the summary of a run as (name, value) pairs."""
    return [
        ("Model", run.model or NOT_RECORDED),
        ("Data", run.data or NOT_RECORDED),
        ("Optimizer", run.optimizer or f"{NOT_RECORDED}: no {REPORT}, so that it was not Muon"),
        ("Loss", _losses(run)),
        ("Progress", _progress(run)),
        ("Time", _time(run)),
        ("Optimizer state", megabytes(run.state_bytes) if run.state_bytes else NOT_RECORDED),
    ]


def _losses(run: Run) -> str:
    said = []
    if run.final is not None:
        said.append(f"validation {run.final:.4f}")
    points = run.logged.get("eval_loss", [])
    if points:
        step, lowest = min(points, key=lambda point: point[1])
        if step != points[-1][0]:
            said.append(f"lowest validation {lowest:.4f} at step {step:,.0f}")
    training = run.last("loss")
    if training is not None:
        said.append(f"training {training:.4f}")
    return ", ".join(said) or NOT_RECORDED


def _progress(run: Run) -> str:
    if run.step is None:
        return NOT_RECORDED
    text = f"{run.step:,} steps"
    if run.max_steps:
        done = "finished" if run.step >= run.max_steps else "not finished"
        text = f"{run.step:,} of {run.max_steps:,} steps, {done}"
    return f"{text}, {count(int(run.tokens))} tokens" if run.tokens else text


def _time(run: Run) -> str:
    said = [duration(run.seconds)] if run.seconds else []
    if run.speed:
        said.append(f"{run.speed:,.0f} tokens/s")
    if run.share is not None:
        said.append(f"{run.share:.1%} of a step is the optimizer's")
    return ", ".join(said) or NOT_RECORDED


def duration(seconds: float) -> str:
    """Format a duration: ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def _spectra(run: Run) -> list[str]:
    """Return the sections with the samples and the warnings of a SpectralMonitor."""
    drawn = svg(spectra_figure(run.samples), "spectra") if run.samples else ""
    rows = [(one["step"], one["layer"] or "all", one["warning"]) for one in run.warned]
    return [
        page.section(
            "Spectra",
            page.figures([(drawn, "")], large=True),
            f"No samples in {FILE_NAME}: no SpectralMonitor watched this run. It is a callback: "
            "Trainer(..., callbacks=[hf_muon.SpectralMonitor()]).",
        ),
        page.section("Warnings", page.table(["step", "layer", "warning"], rows)),
    ]


_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)\.(?P<rest>.+)$")


def _routes(routes: Sequence[dict[str, Any]]) -> str:
    """Return the routing table: consecutive identical layers share a fold, all else has one."""
    layers: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    outside = []
    for route in routes:
        found = _LAYER.match(route["name"])
        if found is None:
            outside.append(route)
        else:
            key = (found["stack"], int(found["number"]))
            layers[key].append({**route, "name": found["rest"]})
    rows = {key: [_row(route) for route in inside] for key, inside in layers.items()}
    # The layers of a stack are sorted by number, so that identical ones are neighbors.
    stacks = list(dict.fromkeys(stack for stack, _ in layers))
    ordered = sorted(layers, key=lambda key: (stacks.index(key[0]), key[1]))
    folds = []
    for (stack, _), alike in groupby(ordered, key=lambda key: (key[0], rows[key])):
        numbers = [number for _, number in alike]
        key = (stack, numbers[0])
        several = f" to {numbers[-1]}, {len(numbers)} alike" if len(numbers) > 1 else ""
        folds.append(
            page.folded(f"{stack}.{numbers[0]}{several}", _counts(layers[key]), _table(rows[key]))
        )
    if outside:
        title = "outside of the layers" if layers else "all parameters"
        inside = _table([_row(route) for route in outside])
        folds.append(page.folded(title, _counts(outside), inside, is_open=True))
    return "\n".join(folds)


def _row(route: dict[str, Any]) -> tuple[str, ...]:
    factor = route.get("lr_multiplier", 1.0)
    reason = str(route["reason"]) + (f"; rate × {factor:g}" if factor != 1 else "")
    return route["name"], shape(route["shape"]), str(route["algorithm"]), reason


def _table(rows: Iterable[Sequence[str]]) -> str:
    return page.table(["parameter", "shape", "algorithm", "reason"], rows)


def _counts(routes: Sequence[dict[str, Any]]) -> str:
    muon = sum(route["algorithm"] == "muon" for route in routes)
    others = len(routes) - muon
    said = [f"{muon} by Muon"] * bool(muon) + [f"{others} by AdamW"] * bool(others)
    return ", ".join(said)
