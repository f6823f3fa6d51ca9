"""The command line: ``hf-muon <command>``.

In: arguments. Out: text or JSON on standard output, errors as one sentence on standard error.
Exit codes: 0 done, 1 the answer is an error (nothing to train with Muon), 2 wrong arguments.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def main() -> None:
    """Muon for the Hugging Face Trainer."""


@app.command()
def route(
    source: Annotated[str, typer.Argument(help="A config.json, a model folder, or a model id.")],
    optim_args: Annotated[
        str, typer.Option(help='Settings as the Trainer takes them: "split_fused=true,…".')
    ] = "",
    auto: Annotated[
        str | None, typer.Option(help="Which Auto class: causal-lm, masked-lm, base, …")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="A line per parameter, none folded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show which parameters of a model go to Muon, which to AdamW, and why. Reads no weights."""
    from transformers.utils import logging

    from hf_muon.config import MuonConfig
    from hf_muon.routing.blueprint import build
    from hf_muon.routing.plan import route as plan_route
    from hf_muon.routing.plan import state_bytes

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        config = MuonConfig.from_optim_args(optim_args or None)
        plan = plan_route(build(source, auto), config)
    except ValueError as error:
        _fail(str(error), code=2)
    state = state_bytes(plan, config)
    if as_json:
        typer.echo(json.dumps({**plan.to_dict(), "state_bytes": state}, indent=2))
    else:
        typer.echo(plan.table(compact=False if full else None))
        typer.echo(_state(state))
    try:
        plan.require_matrices()
    except ValueError as error:
        _fail(str(error), code=1)


def _state(state: dict[str, Any]) -> str:
    share = state["total"] / state["adamw_only"] if state["adamw_only"] else 0.0
    return (
        f"Optimizer state: {state['total']:,} bytes (Muon {state['muon']:,}, AdamW "
        f"{state['adamw']:,}), {share:.0%} of AdamW alone ({state['adamw_only']:,})."
    )


def _fail(message: str, *, code: int) -> NoReturn:
    typer.echo(f"hf-muon: {message}", err=True)
    raise typer.Exit(code)
