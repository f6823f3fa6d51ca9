"""The work of a step for a device, and how long it takes at the rates of the device.

In: the matrices of a model, settings, ranks, a device. Out: a :class:`Roofline`: counts of the real
step on meta tensors, and milliseconds. If several ranks share the work, the counts are for a rank
that is the busiest one in every bucket: its polar factors, the elementwise work on its pieces, and
the copies into and out of messages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hf_muon.commands.counted import HALF_PRECISION, Counts, counting
from hf_muon.commands.hardware import Device
from hf_muon.commands.imaginary import Parameter, World, planned
from hf_muon.config import MuonConfig
from hf_muon.distributed.buckets import Bucket, Unit
from hf_muon.distributed.layout import Matrix
from hf_muon.distributed.owners import polar_cost
from hf_muon.optimizer import Muon
from hf_muon.optimizer.step import polar_function
from hf_muon.polar import Watch, Workspace, apply_together, batched
from hf_muon.rules import MAPS
from hf_muon.stages import WholeMap

OPERATION_US, LISTED_US, LAUNCH_US = 3.5, 4.5, 2.5
"""Microseconds that the host spends on an operator, on a tensor in its lists (with all the work of
the step on it), and on a launch. The first two fit whole steps on tiny matrices, of this package
and of torch, on one core of a server CPU to within 20 %; the third is a typical figure, not a
measurement."""

META = torch.device("meta")


@dataclass(frozen=True)
class Roofline:
    """The work of the Muon half of a step for a device.

    Attributes:
        counts: The work.
        held: Bytes of weights, gradients and momentum of Muon's matrices that the rank holds.
        device: The device, with its rates.
        is_whole: Whether there is only one rank, so that everything was counted, including memory.
        products: Implementation of matrix products: ``torch``, ``triton`` or ``quack``.
    """

    counts: Counts
    held: int
    device: Device
    is_whole: bool
    products: str = "torch"

    def milliseconds(self, *, of_products: bool) -> float:
        """Return how long the device works: per kernel the longer of arithmetic and memory traffic.

        Args:
            of_products: Whether to return the time of matrix products, or of all other work.
        """
        seconds = 0.0
        for work, times in self.counts.work.items():
            if (work.flop > 0) is of_products:
                computing = work.flop / self.device.operations_per_second(in_half=work.in_half)
                seconds += times * max(computing, work.nbytes / self.device.bytes_per_second)
        return 1e3 * seconds

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        counts = self.counts
        products, others = (self.milliseconds(of_products=which) for which in (True, False))
        return {
            "device": self.device.title,
            "products": self.products,
            "operations": counts.operations,
            "launches": counts.launches,
            "host_waits": counts.waits,
            "flops": counts.flop,
            "bytes_touched": counts.nbytes,
            "products_ms": products,
            "elementwise_ms": others,
            "device_ms": products + others,
            "host_ms": host_milliseconds(counts),
            "peak_temporary_bytes": counts.peak if self.is_whole else None,
            "held_bytes": self.held,
            "device_memory_bytes": self.device.memory_gb and int(1e9 * self.device.memory_gb),
        }


def host_milliseconds(counts: Counts) -> float:
    """Estimate how long the host takes to launch all the work."""
    listed = LISTED_US * counts.listed + LAUNCH_US * counts.launches
    return (OPERATION_US * counts.operations + listed) / 1e3


def roofline(
    groups: Sequence[Sequence[Parameter]],
    config: MuonConfig,
    world: World,
    device: Device,
    *,
    dtype: torch.dtype,
    wire: torch.dtype,
) -> Roofline:
    """Count the work of a step on each rank's device.

    ``dtype`` is that of the parameters and their gradients, ``wire`` that of the polar factors.
    """
    name = str(wire).removeprefix("torch.")
    config = _with(config, polar_dtype=name, compile=False, cuda_graph=False, lr=config.lr or 1e-3)
    products = _products(config, wire)
    config = _with(config, polar_kernel=products)
    if world.ranks == 1:
        counts, held = of_step(groups, config, dtype)
        return Roofline(counts, held, device, is_whole=True, products=products)
    buckets = list(chain.from_iterable(planned(groups, config, world, wire, "cuda")))
    pieces = [_pieces(bucket) for bucket in buckets]
    with _left_out() as left_out:
        counts, held = of_step(pieces, _with(config, matrix_map=left_out), dtype)
    for bucket in buckets:
        counts += _of_polar_factors(bucket, config, wire)
        counts += _of_messages(bucket, wire)
    return Roofline(counts, held, device, is_whole=False, products=products)


def of_step(
    groups: Sequence[Sequence[Parameter]], config: MuonConfig, dtype: torch.dtype
) -> tuple[Counts, int]:
    """Count a step in one process, after the one that creates the state.

    Returns:
        The counts, and the bytes of weights, gradients and state.
    """
    given = []
    for group in groups:
        params = [
            torch.nn.Parameter(torch.empty(one.shape, dtype=dtype, device=META)) for one in group
        ]
        for parameter in params:
            parameter.grad = torch.empty_like(parameter)
        matrices = [parameter.matrices for parameter in group]
        given.append({**config.muon_group(), "params": params, "matrices": matrices})
    optimizer = Muon([group for group in given if group["params"]], config=config)
    with counting():  # creates the state; stand-ins give checks the values that they read
        optimizer.step()
    with counting() as counts:
        optimizer.step()
    held = 0
    for weight, state in optimizer.state.items():
        held += 2 * weight.nbytes  # and the gradient
        held += sum(one.nbytes for one in state.values() if one.device == META)
    return counts, held


def _products(config: MuonConfig, wire: torch.dtype) -> str:
    """Return the likely implementation of products; on the device itself ``auto`` runs a check."""
    if config.polar_kernel != "auto":
        return config.polar_kernel
    return "triton" if wire in HALF_PRECISION and find_spec("triton") is not None else "torch"


def _with(config: MuonConfig, **settings: Any) -> MuonConfig:
    return MuonConfig.from_mapping({**config.to_dict(), **settings})


@contextmanager
def _left_out() -> Iterator[str]:
    """Register a map that leaves matrices unchanged, and yield its name."""
    name = "left_out"
    MAPS[name] = WholeMap(lambda X, polar, settings: X, replaces=True, may_fail=False)
    try:
        yield name
    finally:
        del MAPS[name]


def _pieces(bucket: Bucket) -> list[Parameter]:
    """Return the pieces that the first rank holds; no other rank holds more."""
    shapes = [(p.rows, p.cols) for unit in bucket.units for p in unit.pieces[0] if p.numel]
    return [Parameter(shape, (Matrix.whole(shape),)) for shape in shapes]


def _busiest(bucket: Bucket) -> list[Unit]:
    """Return the units of the owner with the most work."""
    owned: dict[tuple[int, int], list[Unit]] = defaultdict(list)
    for unit in bucket.units:
        owned[unit.owner].append(unit)
    return max(owned.values(), key=lambda units: sum(polar_cost(*unit.shape) for unit in units))


def _of_polar_factors(bucket: Bucket, config: MuonConfig, wire: torch.dtype) -> Counts:
    shapes = [unit.shape for unit in _busiest(bucket)]
    function, together = _mapping(config)
    with counting() as counts:
        for places in batched(shapes) if together else [[place] for place in range(len(shapes))]:
            of_batch = [shapes[place] for place in places]
            batch = torch.empty(len(places), *of_batch[0], dtype=wire, device=META)
            apply_together(function, batch, of_batch)
    return counts


def _mapping(config: MuonConfig) -> tuple[Callable[[Tensor], object], bool]:
    """Return a function that applies the map to matrices in place, and whether it takes batches."""
    whole, settings = config.rule.whole, config.muon_group()
    # As in a step, which checks each polar factor that is computed in half precision.
    polar = partial(polar_function(settings, Workspace()), outliers=Watch([]))
    if whole.replaces and config.polar_method != "svd":
        return lambda X: whole.run(X, partial(polar, out=X), settings), True
    return lambda X: X.copy_(whole.run(X, polar, settings)), whole.replaces


def _of_messages(bucket: Bucket, wire: torch.dtype) -> Counts:
    """Count an owner's copies: other ranks' pieces into its matrices and back, results to replicas.

    The elementwise work includes the packing of what it sends to other owners.
    """
    mine = _busiest(bucket)
    replica, owner = mine[0].owner
    others = [
        piece
        for unit in mine
        for member, pieces in enumerate(unit.pieces)
        for piece in pieces
        if member != owner
    ]
    copied = [others, others]
    if bucket.replicate.size > 1:
        contributed = [unit for unit in bucket.units if unit.owner[0] == replica]
        copied.append([piece for unit in contributed for piece in unit.pieces[owner]])
    with counting() as counts:
        for pieces in filter(None, copied):
            blocks = [torch.empty(p.rows, p.cols, dtype=wire, device=META) for p in pieces]
            torch._foreach_copy_(list(map(torch.empty_like, blocks)), blocks)
    return counts
