"""The command line: ``hf-muon <command>``.

In: arguments. Out: text or JSON on standard output, errors as one sentence on standard error.
Exit codes: 0 success, 1 the model has no matrix for Muon, 2 wrong arguments or unreadable input.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_muon.commands.blueprint import require_matrices, routed
from hf_muon.commands.convert import convert
from hf_muon.commands.env import env, installed
from hf_muon.commands.observe import show
from hf_muon.commands.plan import Auto, OptimArgs, plan
from hf_muon.commands.probe import probe
from hf_muon.commands.report import report
from hf_muon.routing.plan import state_bytes
from hf_muon.shown import megabytes

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-muon {installed('hf-muon')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Muon for the Hugging Face Trainer."""


def route(
    source: Annotated[
        str | None, typer.Argument(help="A config.json, a model folder, or a model id.")
    ] = None,
    optim_args: OptimArgs = "",
    auto: Auto = None,
    full: Annotated[
        bool, typer.Option("--full", help="A line per parameter, none folded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    observe: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="In place of a model: the output folder of a run with a SpectralMonitor. Shows "
            "what it says about the routing of the next run.",
        ),
    ] = None,
) -> None:
    """Show which parameters of a model go to Muon, which to AdamW, and why. Reads no weights."""
    if observe is not None:
        if source is not None or optim_args or auto or full:
            raise ValueError("--observe reads a run and no model: it stands alone, or with --json.")
        show(observe, as_json=as_json)
        return
    if source is None:
        raise ValueError("Give a config.json, a model folder or a model id, or --observe RUN.")
    routes, config = routed(source, optim_args, auto)
    state = state_bytes(routes, config)
    if as_json:
        typer.echo(json.dumps({**routes.to_dict(), "state_bytes": state}, indent=2))
    else:
        typer.echo(routes.table(compact=False if full else None))
        share = state["total"] / state["adamw_only"] if state["adamw_only"] else 0.0
        typer.echo(
            f"Optimizer state: {megabytes(state['total'])} (Muon {megabytes(state['muon'])}, "
            f"AdamW {megabytes(state['adamw'])}), {share:.0%} of AdamW alone "
            f"({megabytes(state['adamw_only'])})."
        )
    require_matrices(routes)


def _in_a_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that an error prints one line on standard error and exits with code 2."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            typer.echo(f"hf-muon: {error}", err=True)
            raise typer.Exit(2) from error

    return run


for _command in (route, plan, probe, report, convert, env):
    app.command()(_in_a_sentence(_command))
