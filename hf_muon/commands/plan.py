"""``hf-muon plan``: what the Muon half of a step will cost on ranks that need not exist.

In: a route plan, settings, a :class:`~hf_muon.commands.imaginary.World`, and two rates. Out: a
:class:`Forecast` with the costs of every rank; it prints as a table and exports to JSON. Owners and
buckets come from the code that plans the run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from hf_muon.commands.blueprint import require_matrices, routed
from hf_muon.commands.costs import Cost, bucket_costs, in_flight, one_after_another
from hf_muon.commands.imaginary import Parameter, World, exchanges
from hf_muon.config import MuonConfig
from hf_muon.distributed.buckets import bucket_elements, plan_buckets
from hf_muon.distributed.owners import owning_pays, polar_cost
from hf_muon.optimizer.step import returned_dtype, wire_dtype
from hf_muon.polar import compute_dtype
from hf_muon.routing.plan import RoutePlan
from hf_muon.routing.table import text

DEVICES = ("cuda", "cpu")

Source = Annotated[str, typer.Argument(help="A config.json, a model folder, or a model id.")]
OptimArgs = Annotated[
    str, typer.Option(help='Settings as the Trainer takes them: "split_fused=true,…".')
]
Auto = Annotated[str | None, typer.Option(help="Which Auto class: causal-lm, masked-lm, base, …")]


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
    world = World(layout, ranks, replicas)
    routes, config = routed(source, optim_args, auto)
    require_matrices(routes)
    costs = forecast_routes(routes, config, world, device=device)
    facts = costs.to_dict(tflops, gbps)
    typer.echo(json.dumps(facts, indent=2) if as_json else costs.table(tflops, gbps, full=full))


@dataclass(frozen=True)
class Forecast:
    """Costs of one step on every rank, without those of the AdamW half.

    Attributes:
        world: The ranks.
        ranks: The cost of each.
        steps: Newton–Schulz iterations of a polar factor.
        matrices: Operations of one iteration on each matrix of the model.
        in_lockstep: The same on the busiest rank of each bucket, summed over buckets: how long the
            step takes if every bucket waits for its slowest rank.
        wire: Dtype on the wire.
        back: That of results, on their way back.
        sums: All-reduces of a bucket, of some numbers for each matrix, which no cost counts.
        by_svd: Whether matrices are decomposed, of which the operations say nothing.
    """

    world: World
    ranks: tuple[Cost, ...]
    steps: int
    matrices: tuple[int, ...]
    in_lockstep: int
    wire: torch.dtype
    back: torch.dtype
    sums: int = 0
    by_svd: bool = False

    @property
    def mean(self) -> float:
        """Operations of one iteration, on average over the ranks."""
        return sum(cost.operations for cost in self.ranks) / len(self.ranks)

    @property
    def balance(self) -> float:
        """Most operations of a rank over the mean; 1 is perfect."""
        return max(cost.operations for cost in self.ranks) / self.mean

    @property
    def lower_bound(self) -> float:
        """What no assignment of whole matrices can be below."""
        return max(1.0, max(self.matrices) / self.mean)

    @property
    def idle(self) -> int:
        """Ranks that compute no polar factor."""
        return sum(cost.matrices == 0 for cost in self.ranks)

    def to_dict(self, tflops: float, gbps: float) -> dict[str, Any]:
        """Everything as plain values, for JSON.

        Args:
            tflops: 10¹² operations per second that a rank reaches in matrix products.
            gbps: 10⁹ bytes per second that a rank sends.
        """
        polar_ms = _milliseconds(self.steps, 1e12, "tflops", tflops)
        wire_ms = _milliseconds(1, 1e9, "gbps", gbps)
        return {
            "layout": self.world.kind,
            "ranks": self.world.ranks,
            "replicas": self.world.mesh[0],
            "wire_dtype": str(self.wire).removeprefix("torch."),
            "returned_dtype": str(self.back).removeprefix("torch."),
            "matrices": len(self.matrices),
            "newton_schulz_flops": self.steps * sum(self.matrices),
            "max_over_mean": self.balance,
            "lower_bound": self.lower_bound,
            "idle_ranks": self.idle,
            "all_reduces_per_bucket": self.sums,
            "by_svd": self.by_svd,
            "polar_ms": polar_ms(max(cost.operations for cost in self.ranks)),
            "polar_in_lockstep_ms": polar_ms(self.in_lockstep),
            "polar_duplicated_ms": polar_ms(sum(self.matrices)),
            "wire_ms": wire_ms(max(cost.sent for cost in self.ranks)),
            "per_rank": [
                {
                    "rank": rank,
                    "matrices": cost.matrices,
                    "newton_schulz_flops": self.steps * cost.operations,
                    "bytes_sent": cost.sent,
                    "all_to_all_bytes": cost.exchanged,
                    "all_gather_bytes": cost.replicated,
                    "collectives": cost.collectives,
                    "peak_extra_bytes": cost.memory,
                    "polar_ms": polar_ms(cost.operations),
                    "wire_ms": wire_ms(cost.sent),
                }
                for rank, cost in enumerate(self.ranks)
            ],
        }

    def table(self, tflops: float, gbps: float, *, full: bool = False) -> str:
        """Everything as text.

        Args:
            tflops: As in :meth:`to_dict`.
            gbps: As in :meth:`to_dict`.
            full: A line per rank; default: one line for all ranks with the same numbers.
        """
        facts = self.to_dict(tflops, gbps)
        lines: dict[Any, list[int]] = defaultdict(list)
        for one in facts["per_rank"]:
            cells = [short(one[key] / unit) for key, unit in _COLUMNS.values()]
            lines[(one["rank"] if full else None, *cells)].append(one["rank"])
        table = Table("ranks", *_COLUMNS)
        for (_, *cells), members in lines.items():
            table.add_row(_ranks(members), *cells)
        return text(table) + _summary(facts, tflops, gbps)


_COLUMNS = {  # heading: what is shown of a rank, in which unit
    "matrices": ("matrices", 1),
    "TFLOP": ("newton_schulz_flops", 1e12),
    "MB sent": ("bytes_sent", 1e6),
    "collectives": ("collectives", 1),
    "MB extra": ("peak_extra_bytes", 1e6),
    "polar ms": ("polar_ms", 1),
    "wire ms": ("wire_ms", 1),
}


def _milliseconds(amount: int, unit: float, name: str, rate: float) -> Callable[[int], float]:
    if not rate > 0:
        raise ValueError(f"{name}={rate}: a rate above 0 is expected.")
    return lambda count: 1e3 * amount * count / (unit * rate)


def forecast(
    groups: Sequence[Sequence[Parameter]],
    config: MuonConfig,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> Forecast:
    """Plan a step as the ranks of a world would.

    Args:
        groups: The parameters of each Muon group, in the optimizer's order.
        config: Gives the polar settings, ``distribute`` and ``bucket_mb``.
        world: The ranks.
        dtype: Of the parameters.
        device: ``cuda`` (a GPU that computes in bfloat16) or ``cpu`` (this one).

    Raises:
        ValueError: An unknown device, an update that moves more than gradients, or no matrix.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r} is not one of {', '.join(DEVICES)}.")
    if device == "cpu":
        compute_dtype(config.polar_dtype, torch.device(device))  # raises for float16
    if config.lora_update != "factor":
        raise ValueError(
            f"lora_update={config.lora_update!r}: the weights that travel with a pair of LoRA "
            "factors are not counted; plan with lora_update='factor'."
        )
    matrices = [m for group in groups for parameter in group for m in parameter.matrices]
    if not matrices:
        raise ValueError("No parameter has a matrix: there is no Muon step to plan.")
    wire, back = _wires(config, dtype, device)
    limit, alone = bucket_elements(config.bucket_mb, wire.itemsize)
    plans, in_lockstep, where = [], 0, torch.device(device)
    for group in groups:
        shares = [_shares(parameter, config, wire, device) for parameter in group]
        for layouts in exchanges(group, shares, world):
            buckets = plan_buckets(layouts, [where] * len(layouts), limit, alone=alone)
            if not buckets:
                continue
            costs = [
                bucket_costs(bucket, world.mesh, wire.itemsize, back.itemsize) for bucket in buckets
            ]
            in_lockstep += sum(max(cost.operations for cost in of_ranks) for of_ranks in costs)
            plans.append([in_flight(of_rank) for of_rank in zip(*costs, strict=True)])
    return Forecast(
        world=world,
        ranks=tuple(map(one_after_another, zip(*plans, strict=True))),
        steps=config.polar_steps,
        matrices=tuple(polar_cost(matrix.rows, matrix.cols) for matrix in matrices),
        in_lockstep=in_lockstep,
        wire=wire,
        back=back,
        sums=_sums(config, world),
        by_svd=config.polar_method == "svd" or config.rule.whole.decomposes,
    )


def forecast_routes(
    plan: RoutePlan, config: MuonConfig, world: World, *, device: str = "cuda"
) -> Forecast:
    """The forecast of a routed model; its groups are those of ``RoutePlan.param_groups``."""
    groups = [
        [Parameter(route.shape, route.matrices) for route in plan.muon if route.decay is decay]
        for decay in (True, False)
    ]
    muon = [p for route, p in zip(plan.routes, plan.parameters, strict=True) if route.matrices]
    dtype = muon[0].dtype if muon else torch.float32
    return forecast([g for g in groups if g], config, world, dtype=dtype, device=device)


def _wires(config: MuonConfig, dtype: torch.dtype, device: str) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes there and back, without the device that would be asked what it can do."""
    requested = config.polar_dtype
    if device == "cuda" and requested == "auto" and config.polar_method != "svd":
        requested = "bfloat16"
    settings = {**config.to_dict(), "polar_dtype": requested}
    place = torch.device("cpu" if device == "cpu" else "meta")
    wire = wire_dtype(settings, dtype, place)
    return wire, returned_dtype(settings, wire, place)


def _sums(config: MuonConfig, world: World) -> int:
    """How often a bucket adds up what stages must know of whole matrices, over ranks."""
    rule, (replicas, shards) = config.rule, world.mesh
    following = rule.after[0] if rule.after else rule.write
    asked = [stage for stage in rule.stages if stage.statistic is not None]
    of_pieces, of_owners = len(asked), 0
    if following.statistic is not None and following.statistic.of_input:  # owners measure
        of_owners = 1
    if config.momentum_dtype == "int8":
        of_pieces += sum(buffer.sizes is not None for buffer in rule.buffers)
    of_pieces += config.skip_zero_gradients
    return of_pieces * (shards > 1) + of_owners * (replicas > 1)


def _shares(parameter: Parameter, config: MuonConfig, wire: torch.dtype, device: str) -> bool:
    """Whether ranks that hold copies of a parameter divide the work on it."""
    if config.distribute != "auto" or not parameter.matrices:
        return config.distribute != "redundant"
    matrix = parameter.matrices[0]
    return owning_pays(matrix.rows, matrix.cols, config.polar_steps, wire.itemsize, device)


def short(number: float) -> str:
    """Three digits, or all before the point: ``0.0214``, ``1,710``."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _ranks(members: Sequence[int]) -> str:
    """Ranks in short: ``0-3, 8``, and how many where that is long."""
    breaks = [i for i in range(1, len(members)) if members[i] != members[i - 1] + 1]
    runs = [members[start:stop] for start, stop in zip([0, *breaks], [*breaks, None], strict=True)]
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, … ({len(members)} ranks)"


def _summary(facts: dict[str, Any], tflops: float, gbps: float) -> str:
    busiest, in_lockstep, duplicated, wire = (
        short(facts[f"{name}_ms"])
        for name in ("polar", "polar_in_lockstep", "polar_duplicated", "wire")
    )
    svd = "an SVD takes their place, which these numbers do not foretell; " * facts["by_svd"]
    returned = facts["returned_dtype"]
    back = f", {returned} on the way back" * (returned != facts["wire_dtype"])
    sums = facts["all_reduces_per_bucket"]
    besides = f"\nNot counted: {sums} small all-reduces a bucket, of sums over whole matrices."
    return (
        f"{facts['matrices']:,} polar factors, {short(facts['newton_schulz_flops'] / 1e12)} TFLOP, "
        f"{svd}{facts['wire_dtype']} on the wire{back}. Busiest rank over the mean "
        f"{facts['max_over_mean']:,.2f}, with whole matrices at least "
        f"{facts['lower_bound']:,.2f}; {facts['idle_ranks']} idle ranks.\n"
        f"At {tflops:g} TFLOP/s and {gbps:g} GB/s per rank: polar factors {busiest} ms on the "
        f"busiest rank ({in_lockstep} ms if every bucket waits for its slowest rank, {duplicated} "
        f"ms if every rank computed all), wire {wire} ms."
        f"{besides if sums else ''}"
    )
