"""``hf-muon route --observe RUN``: suggest the next run's routing and momentum from this run.

In: the output folder of a run with a ``SpectralMonitor``, or its ``spectra.jsonl``. Out: numbers
per layer, and ``adamw_params=…`` for the settings of the next run; a table or JSON. It is only
advice: routing never changes during a run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hf_muon.diagnostics.history import FILE_NAME, read_spectra
from hf_muon.diagnostics.observed import Observed, euclidean_parameters, observe, patterns_of
from hf_muon.values import read_json

WIDTH = 100


def show(run: Path, *, as_json: bool) -> None:
    """Print the numbers of a run and the suggestion for the next one.

    Raises:
        ValueError: The run recorded nothing.
    """
    layers = observe(_records(run))
    earlier, routed = _as_it_was(run)
    sent = euclidean_parameters(layers)
    patterns = (*earlier, *patterns_of(sent))
    if as_json:
        typer.echo(json.dumps(_plain(layers, patterns), indent=2))
        return
    typer.echo(_table(layers) + _LEGEND)
    typer.echo(_conclusion(layers, sent, routed))
    if patterns and not _nothing_left(sent, routed):
        typer.echo(f"\nadamw_params={'|'.join(patterns)}")


def _records(run: Path) -> list[dict[str, Any]]:
    try:
        return read_spectra(run)
    except FileNotFoundError:
        raise ValueError(
            f"{str(run)!r} holds no {FILE_NAME}. A run writes one into its output folder with "
            "Trainer(..., callbacks=[hf_muon.SpectralMonitor(layers='.', every=50)])."
        ) from None


def _as_it_was(run: Path) -> tuple[tuple[str, ...], set[str]]:
    """Return the run's ``adamw_params`` and the parameters that Muon trained, from its report.

    Both are empty without a report. The run has no samples of parameters that a pattern sent to
    AdamW, so the next run must keep the patterns.
    """
    report = (run if run.is_dir() else run.parent) / "muon_report.json"
    if not report.is_file():
        return (), set()
    content = read_json(report)
    routes = (content.get("routing") or {}).get("routes", [])
    muon = {route["name"] for route in routes if route["algorithm"] == "muon"}
    return tuple(content["config"]["adamw_params"]), muon


def _plain(layers: Sequence[Observed], patterns: Sequence[str]) -> dict[str, Any]:
    return {
        "layers": [
            {**dataclasses.asdict(one), "spectral": one.spectral, "momentum": one.momentum}
            for one in layers
        ],
        "adamw_params": list(patterns),
        "optim_args": f"adamw_params={'|'.join(patterns)}" if patterns else "",
    }


_COLUMNS = ("nuc G", "st A", "st G", "edge", "noise", "β ≥", "next")
_LEGEND = """\
nuc G: ‖G‖_*²/‖G‖_F² of the gradient; st A: ‖A‖_F²/‖A‖₂² of the layer's input; next: muon
if nuc G ≥ st A (a spectral step beats a Euclidean one, to first order), ? if A is not known.
st G: ‖G‖_F²/‖G‖₂²; edge: singular values of the average above the noise edge; noise: noise over
signal of a gradient, in squares; β: 1 − 1/T_min, which shows every direction above the edge.
"""


def _table(layers: Sequence[Observed]) -> str:
    shared = _shared([one.layer for one in layers])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"in {shared}" if shared else "layer", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for one in layers:
        name = one.layer.removeprefix(f"{shared}.").removesuffix(".weight")
        ranks = (one.nuclear_rank, one.input_rank, one.stable_rank, one.visible_rank)
        verdict = {True: "muon", False: "adamw", None: "?"}[one.spectral]
        numbers = map(_number, (*ranks, one.noise_to_signal))
        beta = "–" if one.momentum is None else f"{one.momentum:.3f}"
        table.add_row(name, *numbers, beta, verdict)
    console = Console(width=WIDTH, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(line for line in lines if line) + "\n"


def _shared(names: Sequence[str]) -> str:
    """Return the path of the modules that contain all layers."""
    steps = zip(*(name.split(".")[:-2] for name in names), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len({*step}) == 1, steps))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _nothing_left(sent: Sequence[str], routed: set[str]) -> bool:
    return bool(routed) and routed <= {*sent}


def _conclusion(layers: Sequence[Observed], sent: Sequence[str], routed: set[str]) -> str:
    known = [one for one in layers if one.spectral is not None]
    samples = max(one.samples for one in layers)
    text = (
        f"The criterion favors AdamW in {sum(not one.spectral for one in known)} of {len(known)} "
        f"matrices whose inputs are known (medians of up to {samples} samples)."
    )
    parameters = {one.parameter for one in layers}
    if missing := len(routed - parameters):
        text += (
            f"\n{missing} parameters of Muon were not watched; SpectralMonitor(layers='.') watches "
            "all."
        )
    if _nothing_left(sent, routed):
        return f"{text}\nThat is every matrix of Muon: use a stock AdamW, without Muon."
    momenta = [one.momentum for one in layers if one.momentum is not None]
    if momenta:
        text += f"\nmomentum={max(momenta):.3f} or more shows all directions above the edge."
    return text + ("\nFor the next run:" if sent else "\nThe next run needs no further pattern.")
