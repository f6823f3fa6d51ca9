"""Bring whole matrices together on their owners, and the results back: buckets of collectives.

In: a bucket of the plan, and two functions: one reads a piece of an input, the other maps a batch
of whole matrices. Out: the result for every piece that this rank holds. A bucket runs

    pieces ── all-to-all ──► owner ── function ── all-to-all ──► pieces ── all-gather ──► replicas

and leaves out what its groups do not need. Every decision follows from the plan, which is the same
on every rank; nothing depends on what a rank happens to hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Item, Unit
from hf_muon.distributed.layout import Piece, Ranks

Read = Callable[[Unit, Piece], Tensor]
MatrixFunction = Callable[[Tensor], Tensor]
Result = dict[Item, Tensor]


def exchange(
    bucket: Bucket, read: Read, function: MatrixFunction, wire: torch.dtype
) -> Generator[None, None, Result]:
    """Apply ``function`` to every matrix of a bucket.

    Yields after each collective is launched, so that others can overlap it, and as often on every
    rank, so that all launch theirs in the same order.

    Args:
        bucket: From :func:`~hf_muon.distributed.buckets.plan_buckets`.
        read: The input of a piece that this rank holds, (rows, cols); called once for each piece
            that this replica computes.
        function: Matrices, alone (m, n) or in a batch (k, m, n), to matrices in ``wire``.
        wire: Dtype on the wire, the one that ``function`` computes in: nothing is lost.

    Returns:
        This rank's pieces of all units, each with its part of the result.
    """
    inputs = yield from gather(bucket, read, wire)
    outputs = dict(zip(inputs, in_batches(list(inputs.values()), function), strict=True))
    inputs.clear()
    return (yield from scatter(bucket, outputs, wire))


def gather(
    bucket: Bucket, read: Read, wire: torch.dtype
) -> Generator[None, None, dict[Unit, Tensor]]:
    """The first half of :func:`exchange`: the whole matrices that this rank owns.

    A matrix of which the owner holds all is what ``read`` gives, in its dtype: maybe a view.
    """
    inputs = {unit: _own_input(unit, bucket, read, wire) for unit in bucket.mine}
    if bucket.gathers:
        yield from _gathered(bucket, inputs, read, wire)
    return inputs


def scatter(
    bucket: Bucket, outputs: dict[Unit, Tensor], wire: torch.dtype
) -> Generator[None, None, Result]:
    """The second half of :func:`exchange`: from whole results in ``wire`` to pieces of all."""
    me = bucket.shard.index
    results = {(u, p): p.of_matrix(outputs[u]) for u in bucket.mine for p in u.pieces[me]}
    if bucket.gathers:
        yield from _scattered(bucket, outputs, results, wire)
    if bucket.replicate.size > 1:
        yield from _replicated(bucket, results, wire)
    return results


def _own_input(unit: Unit, bucket: Bucket, read: Read, wire: torch.dtype) -> Tensor:
    """The matrix on its owner: what it holds in one piece, or a buffer with its pieces."""
    pieces = unit.pieces[bucket.shard.index]
    if len(pieces) == 1 and pieces[0].numel == unit.numel:
        held = read(unit, pieces[0])
        return held if held.device == bucket.device else held.to(bucket.device)  # offloaded
    matrix = torch.empty(unit.shape, dtype=wire, device=bucket.device)
    for piece in pieces:
        piece.of_matrix(matrix).copy_(read(unit, piece))
    return matrix


def _gathered(
    bucket: Bucket, inputs: dict[Unit, Tensor], read: Read, wire: torch.dtype
) -> Generator[None, None, None]:
    """Complete the inputs of this rank's units by what other members hold.

    A function of its own, so that no name keeps the buffers through the polar factors.
    """
    packed = _packed(bucket.outgoing, read, wire, bucket.device)
    received, work = _all_to_all(packed, bucket.outgoing, bucket.incoming, bucket.shard)
    yield
    work.wait()
    for (unit, piece), block in _unpacked(bucket.incoming, received):
        piece.of_matrix(inputs[unit]).copy_(block)


def _scattered(
    bucket: Bucket, outputs: dict[Unit, Tensor], results: Result, wire: torch.dtype
) -> Generator[None, None, None]:
    """Add what the other members of the shard group computed."""
    packed = _packed(bucket.incoming, lambda u, p: p.of_matrix(outputs[u]), wire, bucket.device)
    received, work = _all_to_all(packed, bucket.incoming, bucket.outgoing, bucket.shard)
    yield
    work.wait()
    results.update(_unpacked(bucket.outgoing, received))


def _replicated(bucket: Bucket, results: Result, wire: torch.dtype) -> Generator[None, None, None]:
    """Add what the other replicas computed: an all-gather, padded to the largest of them."""
    replicate = bucket.replicate
    counts = _counts(bucket.by_replica)
    width = max(counts)
    if width == 0:  # this rank and its replicas hold nothing, but their peers do
        yield
        return
    send = torch.empty(width, dtype=wire, device=bucket.device)
    own = [bucket.by_replica[replicate.index]]
    for item, block in _unpacked(own, send):
        block.copy_(results[item])
    send[counts[replicate.index] :].zero_()
    received = torch.empty(replicate.size, width, dtype=wire, device=bucket.device)
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch ≥ 2.13
    work = all_gather(received.view(-1), send, group=replicate.group, async_op=True)
    yield
    work.wait()
    for replica, items in enumerate(bucket.by_replica):
        if replica != replicate.index:
            results.update(_unpacked([items], received[replica]))


def summed(values: Tensor, members: Ranks) -> Generator[None, None, None]:
    """Sum over the members of a group, in place."""
    if members.size > 1:
        work = dist.all_reduce(values, group=members.group, async_op=True)
        yield
        work.wait()


def _counts(lists: Iterable[list[Item]]) -> list[int]:
    return [sum(piece.numel for _, piece in items) for items in lists]


def _packed(
    lists: Iterable[list[Item]], read: Read, wire: torch.dtype, device: torch.device
) -> Tensor:
    """The blocks of all items in one flat tensor."""
    items = [item for items in lists for item in items]
    flat = torch.empty(sum(piece.numel for _, piece in items), dtype=wire, device=device)
    for (unit, piece), block in _unpacked([items], flat):
        block.copy_(read(unit, piece))
    return flat


def _unpacked(lists: Iterable[list[Item]], flat: Tensor) -> Iterator[tuple[Item, Tensor]]:
    """Each item with its block, a view (rows, cols) of the beginning of a flat tensor."""
    items = [item for items in lists for item in items]
    ends = accumulate(piece.numel for _, piece in items)
    for item, end in zip(items, ends, strict=True):
        piece = item[1]
        yield item, flat[end - piece.numel : end].view(piece.rows, piece.cols)


def _all_to_all(
    packed: Tensor, outgoing: list[list[Item]], incoming: list[list[Item]], shard: Ranks
) -> tuple[Tensor, dist.Work]:
    sends, receives = _counts(outgoing), _counts(incoming)
    received = torch.empty(sum(receives), dtype=packed.dtype, device=packed.device)
    work = dist.all_to_all_single(
        received, packed, receives, sends, group=shard.group, async_op=True
    )
    return received, work


# Up to this many elements a CPU orthogonalizes matrices faster in a batch than one by one: 32 of
# 8 × 384 by 11 times, of 64 × 256 by 1.3, of 128 × 128 by 0.8 (scripts/bench/step.py --batching).
_CPU_BATCHED_ELEMENTS = 2**14


def in_batches(matrices: Sequence[Tensor], function: MatrixFunction) -> list[Tensor]:
    """``function`` of each matrix, those of one shape together where that is faster."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alone = matrix.device.type == "cpu" and matrix.numel() > _CPU_BATCHED_ELEMENTS
        groups[(*matrix.shape, index if alone else -1)].append(index)
    results: dict[int, Tensor] = {}
    for (*_, alone_or_not), indices in groups.items():
        first = matrices[indices[0]]
        if len(indices) == 1 and (alone_or_not >= 0 or first.device.type != "cpu"):
            results[indices[0]] = function(first)
            continue
        # A CPU rounds alike in all batches of two or more, but not in a batch of one: that is
        # doubled, so that results do not depend on what else a rank owns.
        copies = indices * 2 if len(indices) == 1 else indices
        batch = function(torch.stack([matrices[index] for index in copies]))
        results.update(zip(copies, batch, strict=True))
    return [results[index] for index in range(len(matrices))]


def run_overlapped(steps: Iterable[Generator[None, None, None]]) -> None:
    """Run generators to their ends, with collectives of some while others compute.

    A round starts one and moves all others on, the youngest first: what it sends is on its way
    before an older one computes, and what that one sends before a still older one waits. Every rank
    does so in the same order. As many are in flight as a step has collectives, and one.
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
