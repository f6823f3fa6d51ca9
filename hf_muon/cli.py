"""The command line: ``hf-muon <command>``.

In: arguments. Out: text or JSON on standard output, errors as one sentence on standard error.
Exit codes: 0 done, 1 the answer is an error (nothing to train with Muon), 2 wrong arguments.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hf_muon.model_probe import probe
from hf_muon.run_report import report

if TYPE_CHECKING:
    from hf_muon.config import MuonConfig
    from hf_muon.routing.plan import RoutePlan

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def main() -> None:
    """Muon for the Hugging Face Trainer."""


Source = Annotated[str, typer.Argument(help="A config.json, a model folder, or a model id.")]
OptimArgs = Annotated[
    str, typer.Option(help='Settings as the Trainer takes them: "split_fused=true,…".')
]
Auto = Annotated[str | None, typer.Option(help="Which Auto class: causal-lm, masked-lm, base, …")]


@app.command()
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
    from hf_muon.routing.plan import state_bytes

    routes, config = _routed(source, optim_args, auto)
    state = state_bytes(routes, config)
    if as_json:
        typer.echo(json.dumps({**routes.to_dict(), "state_bytes": state}, indent=2))
    else:
        typer.echo(routes.table(compact=False if full else None))
        typer.echo(_state(state))
    _require_matrices(routes)


@app.command()
def plan(
    source: Source,
    ranks: Annotated[int, typer.Option(help="How many ranks train together.")],
    layout: Annotated[str, typer.Option(help="ddp, fsdp2, hsdp, zero1, zero2 or zero3.")] = "fsdp2",
    replicas: Annotated[
        int | None, typer.Option(help="hsdp: copies of the model, a divisor of the ranks.")
    ] = None,
    optim_args: OptimArgs = "",
    auto: Auto = None,
    device: Annotated[str, typer.Option(help="cuda (with bfloat16) or cpu (this one).")] = "cuda",
    tflops: Annotated[
        float, typer.Option(help="10^12 operations per second of a rank's matrix products.")
    ] = 400.0,
    gbps: Annotated[float, typer.Option(help="10^9 bytes per second that a rank sends.")] = 50.0,
    full: Annotated[bool, typer.Option("--full", help="A line per rank, none folded.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a step of Muon costs each of N ranks. Reads no weights, needs one process."""
    from hf_muon.distributed.imaginary import World
    from hf_muon.forecast import forecast_routes

    routes, config = _routed(source, optim_args, auto)
    _require_matrices(routes)
    try:
        world = World(layout, ranks, replicas)
        costs = forecast_routes(routes, config, world, device=device)
        facts = costs.to_dict(tflops, gbps)
    except ValueError as error:
        _fail(str(error), code=2)
    typer.echo(json.dumps(facts, indent=2) if as_json else costs.table(tflops, gbps, full=full))


app.command()(probe)
app.command()(report)


def _routed(source: str, optim_args: str, auto: str | None) -> tuple[RoutePlan, MuonConfig]:
    """The routes of a model without its weights; wrong arguments end the command."""
    from transformers.utils import logging

    from hf_muon.config import MuonConfig
    from hf_muon.routing.blueprint import build
    from hf_muon.routing.plan import route

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        config = MuonConfig.from_optim_args(optim_args or None)
        return route(build(source, auto), config), config
    except ValueError as error:
        _fail(str(error), code=2)


def _require_matrices(routes: RoutePlan) -> None:
    try:
        routes.require_matrices()
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
