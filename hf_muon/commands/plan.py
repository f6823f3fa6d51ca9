"""``hf-muon plan``: what the Muon half of a step will cost on ranks that need not exist.

In: a route plan, settings, a :class:`~hf_muon.commands.imaginary.World`, and a device with its
links. Out: a :class:`Forecast` with the costs of every rank, as a table or as JSON. Owners and
buckets come from the code that also plans a real run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from hf_muon.commands.blueprint import require_matrices, routed
from hf_muon.commands.costs import Cost, bucket_costs, in_flight, one_after_another
from hf_muon.commands.hardware import (
    DEVICES,
    IB_GBPS,
    RANKS_PER_NODE,
    Links,
    device_of,
    links_of,
    require_rate,
)
from hf_muon.commands.imaginary import Parameter, World, planned, wires_of
from hf_muon.commands.roofline import roofline
from hf_muon.config import MuonConfig
from hf_muon.distributed.owners import polar_cost
from hf_muon.polar import compute_dtype
from hf_muon.routing.plan import RoutePlan
from hf_muon.routing.table import text

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
    device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)} (this one).")] = "cuda",
    tflops: Annotated[
        float | None,
        typer.Option(
            help="10^12 operations per second of a rank's matrix products. Default: 0.7 of the "
            "device's datasheet."
        ),
    ] = None,
    gbps: Annotated[
        float | None, typer.Option(help="10^9 bytes per second that a rank sends, to any other.")
    ] = None,
    nvlink_gbps: Annotated[
        float | None,
        typer.Option(help="The same inside a node. Default: 0.8 of the device's datasheet."),
    ] = None,
    ib_gbps: Annotated[
        float | None,
        typer.Option(help=f"The same between nodes. Default: 0.8 of {IB_GBPS:g}."),
    ] = None,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks that share a node.")] = RANKS_PER_NODE,
    full: Annotated[bool, typer.Option("--full", help="A line per rank, none folded.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a step of Muon costs each of N ranks. Reads no weights, needs one process."""
    world = World(layout, ranks, replicas)
    routes, config = routed(source, optim_args, auto)
    require_matrices(routes)
    chosen = device_of(device)
    links = links_of(chosen, gbps, nvlink_gbps, ib_gbps, ranks_per_node)
    if tflops is not None:
        chosen = chosen.with_tflops(tflops)
    rate = chosen.operations_per_second(in_half=True) / 1e12
    groups, dtype = groups_of(routes), dtype_of(routes)
    costs = forecast(groups, config, world, dtype=dtype, device=device)
    facts = costs.to_dict(rate, links)
    if device != "cpu":  # a CPU has no kernel launches, and its step runs differently
        asked = roofline(groups, config, world, chosen, dtype=dtype, wire=costs.wire)
        facts["roofline"] = asked.to_dict()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(_table(facts, full=full) + _summary(facts, rate, links))
        if device != "cpu":
            typer.echo(_asked(facts["roofline"]))


@dataclass(frozen=True)
class Forecast:
    """Costs of one step on every rank, without the AdamW half.

    Attributes:
        world: The ranks.
        ranks: The cost of each rank.
        steps: Newton–Schulz iterations per polar factor.
        matrices: Operations of one iteration on each matrix of the model.
        in_lockstep: Operations of one iteration on the busiest rank of each bucket, summed over
            buckets: the work that the step takes if every bucket waits for its slowest rank.
        wire: Dtype on the wire.
        back: Dtype of results on their way back.
        sums: All-reduces per bucket, of a few numbers per matrix; the costs leave them out.
        by_svd: Whether an SVD replaces the iteration; then the operations say nothing about time.
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
        """Operations of one iteration on a rank, averaged over the ranks."""
        return sum(cost.operations for cost in self.ranks) / len(self.ranks)

    @property
    def balance(self) -> float:
        """Operations of the busiest rank over the mean; 1 is perfect."""
        return max(cost.operations for cost in self.ranks) / self.mean

    @property
    def lower_bound(self) -> float:
        """The lowest balance that an assignment of whole matrices can reach."""
        return max(1.0, max(self.matrices) / self.mean)

    @property
    def idle(self) -> int:
        """Number of ranks that compute no polar factor."""
        return sum(cost.matrices == 0 for cost in self.ranks)

    def to_dict(self, tflops: float, links: Links) -> dict[str, Any]:
        """Return everything as plain values, for JSON.

        Args:
            tflops: Rate that a rank reaches in matrix products, 10¹² operations per second.
            links: Rates at which a rank sends.
        """
        require_rate("tflops", tflops)
        wires = [self._wire_ms(cost, rank, links) for rank, cost in enumerate(self.ranks)]

        def polar_ms(operations: int) -> float:
            return self.steps * operations / (1e9 * tflops)

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
            "wire_ms": max(wires),
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
                    "wire_ms": wires[rank],
                }
                for rank, cost in enumerate(self.ranks)
            ],
        }

    def _wire_ms(self, cost: Cost, rank: int, links: Links) -> float:
        """Return how long a rank sends, in milliseconds.

        All-to-alls go to the ranks that share its copy, all-gathers to the other copies.
        """
        shards = self.world.mesh[1]
        first = rank - rank % shards
        copies = range(rank % shards, self.world.ranks, shards)
        return links.milliseconds(
            cost.exchanged, rank, range(first, first + shards)
        ) + links.milliseconds(cost.replicated, rank, copies)


def forecast(
    groups: Sequence[Sequence[Parameter]],
    config: MuonConfig,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> Forecast:
    """Plan a step as the ranks of a world would, and return its costs.

    Args:
        groups: The parameters of each Muon group, in the optimizer's order.
        config: Provides the polar settings, ``distribute`` and ``bucket_mb``.
        world: The ranks.
        dtype: Dtype of the parameters. Default: float32.
        device: A key of :data:`~hf_muon.commands.hardware.DEVICES`: a GPU, which computes in
            bfloat16, or ``cpu`` (this one). Default: ``cuda``.

    Raises:
        ValueError: The device is unknown, the update exchanges more than gradients, or there is no
            matrix.
    """
    device_of(device)  # raises for an unknown device
    device_type = "cpu" if device == "cpu" else "cuda"
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
    wire, back = wires_of(config, dtype, device_type)
    plans, in_lockstep = [], 0
    for buckets in planned(groups, config, world, wire, device_type):
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


def groups_of(plan: RoutePlan) -> list[list[Parameter]]:
    """Return the matrices of a routed model in the groups of ``RoutePlan.param_groups``."""
    groups = [
        [Parameter(route.shape, route.matrices) for route in plan.muon if route.decay is decay]
        for decay in (True, False)
    ]
    return [group for group in groups if group]


def dtype_of(plan: RoutePlan) -> torch.dtype:
    """Return the dtype of the first parameter of a routed model that Muon trains."""
    both = zip(plan.routes, plan.parameters, strict=True)
    return next(parameter.dtype for route, parameter in both if route.matrices)


def _sums(config: MuonConfig, world: World) -> int:
    """Return how many all-reduces a bucket needs for sums over whole matrices."""
    rule, (replicas, shards) = config.rule, world.mesh
    following = rule.after[0] if rule.after else rule.write
    asked = [stage for stage in rule.stages if stage.statistic is not None]
    by_owners = following.statistic is not None and following.statistic.of_input
    of_pieces = len(asked)
    if config.momentum_dtype == "int8":
        of_pieces += sum(buffer.sizes is not None for buffer in rule.buffers)
    of_pieces += config.skip_zero_gradients
    return of_pieces * (shards > 1) + by_owners * (replicas > 1)


def short(number: float) -> str:
    """Format a number with three digits, or all digits before the point: ``0.0214``, ``1,710``."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


_COLUMNS = {  # heading: (key, unit)
    "matrices": ("matrices", 1),
    "TFLOP": ("newton_schulz_flops", 1e12),
    "MB sent": ("bytes_sent", 1e6),
    "collectives": ("collectives", 1),
    "MB extra": ("peak_extra_bytes", 1e6),
    "polar ms": ("polar_ms", 1),
    "wire ms": ("wire_ms", 1),
}


def _table(facts: dict[str, Any], *, full: bool) -> str:
    """Return a line for each rank, or one for all ranks with the same numbers."""
    lines: dict[Any, list[int]] = defaultdict(list)
    for one in facts["per_rank"]:
        cells = [short(one[key] / unit) for key, unit in _COLUMNS.values()]
        lines[(one["rank"] if full else None, *cells)].append(one["rank"])
    table = Table("ranks", *_COLUMNS)
    for (_, *cells), members in lines.items():
        table.add_row(_ranks(members), *cells)
    return text(table)


def _ranks(members: Sequence[int]) -> str:
    """Abbreviate ranks as ``0-3, 8``; a long list is cut short and gives their number."""
    breaks = [i for i in range(1, len(members)) if members[i] != members[i - 1] + 1]
    runs = [members[start:stop] for start, stop in zip([0, *breaks], [*breaks, None], strict=True)]
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, … ({len(members)} ranks)"


def _summary(facts: dict[str, Any], tflops: float, links: Links) -> str:
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
        f"At {tflops:g} TFLOP/s and {links} per rank: polar factors {busiest} ms on the "
        f"busiest rank ({in_lockstep} ms if every bucket waits for its slowest rank, {duplicated} "
        f"ms if every rank computed all), wire {wire} ms."
        f"{besides if sums else ''}"
    )


def _asked(facts: dict[str, Any]) -> str:
    """Describe the work of the device in sentences."""
    products, others, device, host = (
        short(facts[f"{name}_ms"]) for name in ("products", "elementwise", "device", "host")
    )
    peak, memory = facts["peak_temporary_bytes"], facts["device_memory_bytes"]
    who = "A step" if peak is not None else "A step of the busiest rank"
    temporaries = "" if peak is None else f", temporaries at most {peak / 1e6:,.0f} MB"
    of = "" if memory is None else f" of {memory / 1e9:,.0f} GB"
    return (
        f"{who} on {facts['device']}: {facts['launches']:,} launches in "
        f"{facts['operations']:,} operations, host waits {facts['host_waits']}, "
        f"{short(facts['flops'] / 1e12)} TFLOP, {short(facts['bytes_touched'] / 1e9)} GB of "
        f"memory traffic. Products, by {facts['products']}, {products} ms and the rest {others} "
        f"ms, together {device} ms on the device; the host takes about {host} ms to launch it all, "
        f"meanwhile.\n"
        f"Weights, gradients and momentum of these matrices take {facts['held_bytes'] / 1e9:,.2f} "
        f"GB{of}{temporaries}."
    )
