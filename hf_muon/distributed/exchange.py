"""Bring whole matrices together on their owners, and send the results back: bucketed collectives.

In: a bucket of the plan, and two functions: one writes pieces of the inputs, the other replaces a
batch of whole matrices by results. Out: the result for every piece that this rank holds. A bucket
runs

    pieces ── all-to-all ──► owner ── function ── all-to-all ──► pieces ── all-gather ──► replicas

and skips what its groups do not need. Every decision follows from the plan, which is the same on
every rank, and never from what a rank happens to hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Item, Unit
from hf_muon.distributed.layout import Piece, Ranks
from hf_muon.polar import apply_together

Read = Callable[[Unit, Piece], Tensor]
Fill = Callable[[Sequence[Tensor]], None]
"""Writes what a rank hands over of a bucket, :attr:`Bucket.reads`, into blocks, (rows, cols), of
any dtype."""
Empty = Callable[[str, Sequence[int], torch.dtype, torch.device], Tensor]
"""Makes a tensor, from a name that no other tensor of the bucket has."""
MatrixFunction = Callable[[Tensor], object]
Result = dict[Item, Tensor]


def reading(bucket: Bucket, read: Read) -> Fill:
    """Return a :data:`Fill` from a function that returns one piece, (rows, cols)."""

    def fill(blocks: Sequence[Tensor]) -> None:
        for item, block in zip(bucket.reads, blocks, strict=True):
            block.copy_(read(*item))

    return fill


def newly_allocated(
    name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Allocate a new tensor: the plain :data:`Empty`."""
    return torch.empty(*shape, dtype=dtype, device=device)


def exchange(
    bucket: Bucket,
    fill: Fill,
    function: MatrixFunction,
    wire: torch.dtype,
    empty: Empty = newly_allocated,
    together: bool = True,
    seen: dict[Unit, Tensor] | None = None,
) -> Generator[None, None, Result]:
    """Apply ``function`` to every matrix of a bucket.

    Yields after it launches a collective, so that other work can overlap it. It yields equally
    often on every rank, so that all ranks launch collectives in the same order.

    Args:
        bucket: From :func:`~hf_muon.distributed.buckets.plan_buckets`.
        fill: Writes the pieces that this rank holds of what its replica computes.
        function: Replaces matrices, alone (m, n) or in a batch (k, m, n), by their results.
        wire: Dtype of the matrices, also on the wire: as precise as the dtype that ``function``
            computes in, or less precise if that one is wider.
        empty: Allocates the matrices. Their memory must not be used for another bucket before this
            one's result has been used.
        together: Whether ``function`` also takes batches and transposes.
        seen: Receives the results for the whole matrices that this rank owns.

    Returns:
        This rank's pieces of all units, each with its part of the result.
    """
    batches = _batches(bucket, wire, empty)
    matrices = _by_unit(bucket, batches)
    yield from _gather(bucket, matrices, fill, wire)
    for batch, units in zip(batches, bucket.batches, strict=True) if together else ():
        apply_together(function, batch, [unit.shape for unit in units])
    for matrix in () if together else matrices.values():
        function(matrix)
    if seen is not None:
        seen.update(matrices)
    return (yield from scatter(bucket, matrices, wire))


def gather(
    bucket: Bucket, fill: Fill, wire: torch.dtype
) -> Generator[None, None, dict[Unit, Tensor]]:
    """Return the whole matrices that this rank owns: the first half of :func:`exchange`."""
    matrices = _by_unit(bucket, _batches(bucket, wire, newly_allocated))
    yield from _gather(bucket, matrices, fill, wire)
    return matrices


def scatter(
    bucket: Bucket, outputs: dict[Unit, Tensor], wire: torch.dtype
) -> Generator[None, None, Result]:
    """Distribute whole results in ``wire`` as pieces of all units: the second half of ``exchange``.

    They travel in the dtype :attr:`Bucket.back`, which may be less precise if the results are.
    """
    results = dict(zip(bucket.own, bucket.blocks(outputs), strict=True))
    if bucket.gathers:
        yield from _scattered(bucket, outputs, results, wire)
    if bucket.replicate.size > 1:
        yield from _replicated(bucket, results, wire)
    return results


def _batches(bucket: Bucket, wire: torch.dtype, empty: Empty) -> list[Tensor]:
    """Return memory (k, m, n) for each batch of this rank's matrices, in the first one's shape."""
    shapes = [(len(units), *units[0].shape) for units in bucket.batches]
    # Each begins at a multiple of 64 elements, as a separate allocation would.
    sizes = (64 * math.ceil(math.prod(shape) / 64) for shape in shapes)
    *starts, total = accumulate(sizes, initial=0)
    flat = empty("matrices", (total,), wire, bucket.device)
    return [
        flat[start : start + math.prod(shape)].view(shape)
        for start, shape in zip(starts, shapes, strict=True)
    ]


def _by_unit(bucket: Bucket, batches: Sequence[Tensor]) -> dict[Unit, Tensor]:
    """Return each matrix as a view of its memory, row by row also if it is a transpose."""
    places = zip(chain(*bucket.batches), chain(*batches), strict=True)
    # For small matrices a needless call of view costs more than this check.
    return {
        unit: place if place.shape == unit.shape else place.view(unit.shape)
        for unit, place in places
    }


def _gather(
    bucket: Bucket, matrices: dict[Unit, Tensor], fill: Fill, wire: torch.dtype
) -> Generator[None, None, None]:
    """Write the matrices that this rank owns, from its own pieces and those of others.

    A separate function, so that no name keeps the buffers alive while polar factors are computed.
    """
    own = bucket.blocks(matrices)
    if not bucket.gathers:
        fill(own)
        return
    packed = _flat(bucket.outgoing, wire, bucket.device)
    fill([*own, *(block for _, block in _unpacked(bucket.outgoing, packed))])
    received, work = _all_to_all(packed, bucket.outgoing, bucket.incoming, bucket.shard)
    yield
    work.wait()
    blocks = list(_unpacked(bucket.incoming, received))
    places = [piece.of_matrix(matrices[unit]) for (unit, piece), _ in blocks]
    _copy(places, [block for _, block in blocks])


def _scattered(
    bucket: Bucket, outputs: dict[Unit, Tensor], results: Result, wire: torch.dtype
) -> Generator[None, None, None]:
    """Add the results that the other members of the shard group computed."""
    packed = _flat(bucket.incoming, bucket.back or wire, bucket.device)
    blocks = list(_unpacked(bucket.incoming, packed))
    found = [piece.of_matrix(outputs[unit]) for (unit, piece), _ in blocks]
    _copy([block for _, block in blocks], found)
    received, work = _all_to_all(packed, bucket.incoming, bucket.outgoing, bucket.shard)
    yield
    work.wait()
    results.update(_unpacked(bucket.outgoing, received.to(wire)))


def _replicated(bucket: Bucket, results: Result, wire: torch.dtype) -> Generator[None, None, None]:
    """Add the results of the other replicas: an all-gather, padded to the largest contribution."""
    replicate = bucket.replicate
    counts = _counts(bucket.by_replica)
    width = max(counts)
    if width == 0:  # this rank and its replicas hold nothing, but other shards do
        yield
        return
    send = torch.empty(width, dtype=bucket.back or wire, device=bucket.device)
    own = list(_unpacked([bucket.by_replica[replicate.index]], send))
    _copy([block for _, block in own], [results[item] for item, _ in own])
    send[counts[replicate.index] :].zero_()
    received = torch.empty(replicate.size, width, dtype=send.dtype, device=bucket.device)
    work = all_gather(received.view(-1), send, replicate.group, async_op=True)
    yield
    work.wait()
    received = received.to(wire)
    for replica, items in enumerate(bucket.by_replica):
        if replica != replicate.index:
            results.update(_unpacked([items], received[replica]))


def all_gather(
    out: Tensor, own: Tensor, group: dist.ProcessGroup | None, *, async_op: bool = False
) -> Any:
    """Gather equal parts of all ranks into one tensor, by the name that this torch has for it."""
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch ≥ 2.13
    return gather(out, own, group=group, async_op=async_op)


def combined(
    values: Tensor,
    members: Ranks,
    op: Any = dist.ReduceOp.SUM,
    by: torch.device | None = None,
) -> Generator[None, None, None]:
    """All-reduce values over the members of a group, in place; the default is the sum.

    ``by`` is the device that they communicate on, if the values may be elsewhere.
    """
    if members.size > 1:
        there = values if by is None else values.to(by)
        work = dist.all_reduce(there, op, group=members.group, async_op=True)
        yield
        work.wait()
        if there is not values:
            values.copy_(there)


def _copy(places: list[Tensor], blocks: list[Tensor]) -> None:
    """Write each block to its place, all in one call."""
    if places:
        torch._foreach_copy_(places, blocks)


def _counts(lists: Iterable[list[Item]]) -> list[int]:
    return [sum(piece.numel for _, piece in items) for items in lists]


def _flat(lists: Iterable[list[Item]], wire: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for the blocks of all items, one after the other."""
    return torch.empty(sum(_counts(lists)), dtype=wire, device=device)


def _unpacked(lists: Iterable[list[Item]], flat: Tensor) -> Iterator[tuple[Item, Tensor]]:
    """Return each item with its block, a view (rows, cols) of its section of a flat tensor."""
    items = [item for items in lists for item in items]
    blocks = sections(flat, [(piece.rows, piece.cols) for _, piece in items])
    return zip(items, blocks, strict=True)


def sections(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return consecutive views of a flat tensor, one of each shape."""
    sizes = list(map(math.prod, shapes))
    each = zip(accumulate(sizes), sizes, shapes, strict=True)
    return [flat[end - size : end].view(*shape) for end, size, shape in each]


def _all_to_all(
    packed: Tensor, outgoing: list[list[Item]], incoming: list[list[Item]], shard: Ranks
) -> tuple[Tensor, dist.Work]:
    sends, receives = _counts(outgoing), _counts(incoming)
    received = torch.empty(sum(receives), dtype=packed.dtype, device=packed.device)
    work = dist.all_to_all_single(
        received, packed, receives, sends, group=shard.group, async_op=True
    )
    return received, work


def run_overlapped(steps: Iterable[Generator[None, None, None]]) -> None:
    """Run generators to completion, so that collectives of some overlap with the work of others.

    Each round starts one generator and advances all others, the youngest first: its data is on the
    way before an older one computes, and that one's before a still older one waits. Every rank does
    this in the same order. One more generator is in flight than a step has collectives.
    """
    running: list[Generator[None, None, None]] = []
    for youngest in steps:
        running = [step for step in (youngest, *running) if not _finished(step)]
    while running:
        running = [step for step in running if not _finished(step)]


def _finished(step: Generator[None, None, None]) -> bool:
    try:
        next(step)
    except StopIteration:
        return True
    return False
