"""The command line: ``hf-muon <command>``.

In: arguments. Out: text or JSON on standard output, errors as one sentence on standard error.
Exit codes: 0 done, 1 the answer is an error (nothing to train with Muon), 2 wrong arguments.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hf_muon.commands.blueprint import require_matrices, routed
from hf_muon.commands.plan import Auto, OptimArgs, Source, plan
from hf_muon.commands.probe import probe
from hf_muon.commands.report import report
from hf_muon.routing.plan import state_bytes

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def main() -> None:
    """Muon for the Hugging Face Trainer."""


def route(
    source: Source,
    optim_args: OptimArgs = "",
    auto: Auto = None,
    full: Annotated[
        bool, typer.Option("--full", help="A line per parameter, none folded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show which parameters of a model go to Muon, which to AdamW, and why. Reads no weights."""
    routes, config = routed(source, optim_args, auto)
    state = state_bytes(routes, config)
    if as_json:
        typer.echo(json.dumps({**routes.to_dict(), "state_bytes": state}, indent=2))
    else:
        typer.echo(routes.table(compact=False if full else None))
        share = state["total"] / state["adamw_only"] if state["adamw_only"] else 0.0
        typer.echo(
            f"Optimizer state: {state['total']:,} bytes (Muon {state['muon']:,}, AdamW "
            f"{state['adamw']:,}), {share:.0%} of AdamW alone ({state['adamw_only']:,})."
        )
    require_matrices(routes)


def _in_a_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose errors end it with a line on standard error and exit code 2."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            typer.echo(f"hf-muon: {error}", err=True)
            raise typer.Exit(2) from error

    return run


for _command in (route, plan, probe, report):
    app.command()(_in_a_sentence(_command))
