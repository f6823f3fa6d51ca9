"""Bring whole matrices together on their owners, and the results back: buckets of collectives.

In: the layouts of some parameters, and two functions: one reads a piece of an input, the other maps
a batch of whole matrices. Out: the result for every piece that this rank holds. A bucket runs

    pieces ── all-to-all ──► owner ── function ── all-to-all ──► pieces ── all-gather ──► replicas

and leaves out what its groups do not need. Every decision follows from the plan, which is the same
on every rank; nothing depends on what a rank happens to hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.layout import Layout, Piece, Ranks
from hf_muon.distributed.owners import Balance, polar_cost


@dataclass(eq=False)
class Unit:
    """One matrix of one parameter, and who owns it: (replica, member of the shard group)."""

    parameter: int
    matrix: int
    shape: tuple[int, int]
    pieces: tuple[tuple[Piece, ...], ...]
    owner: tuple[int, int] = (0, 0)

    @property
    def numel(self) -> int:
        """Elements of the whole matrix."""
        return self.shape[0] * self.shape[1]

    def holders(self) -> list[int]:
        """Members of the shard group that hold all of the matrix."""
        held = [sum(piece.numel for piece in pieces) for pieces in self.pieces]
        return [member for member, numel in enumerate(held) if numel == self.numel]


Item = tuple[Unit, Piece]
Read = Callable[[Unit, Piece], Tensor]
MatrixFunction = Callable[[Tensor], Tensor]
Result = dict[Item, Tensor]


@dataclass(eq=False)
class Bucket:
    """Matrices that travel together, between the same ranks."""

    shard: Ranks
    replicate: Ranks
    device: torch.device
    units: list[Unit] = field(default_factory=list)

    @cached_property
    def row(self) -> list[Unit]:
        """The units that this replica computes."""
        return [unit for unit in self.units if unit.owner[0] == self.replicate.index]

    @cached_property
    def mine(self) -> list[Unit]:
        """The units that this rank computes."""
        return [unit for unit in self.row if unit.owner[1] == self.shard.index]

    @cached_property
    def held(self) -> list[Item]:
        """This rank's pieces of all units."""
        return [(unit, piece) for unit in self.units for piece in unit.pieces[self.shard.index]]

    @cached_property
    def outgoing(self) -> list[list[Item]]:
        """For each member of the shard group the pieces that this rank sends to it."""
        return [self._sent(self.shard.index, owner) for owner in range(self.shard.size)]

    @cached_property
    def incoming(self) -> list[list[Item]]:
        """For each member of the shard group the pieces that this rank gets from it."""
        return [self._sent(member, self.shard.index) for member in range(self.shard.size)]

    @cached_property
    def by_replica(self) -> list[list[Item]]:
        """For each replica this rank's pieces of what that replica computes."""
        return [
            [item for item in self.held if item[0].owner[0] == replica]
            for replica in range(self.replicate.size)
        ]

    @cached_property
    def gathers(self) -> bool:
        """Whether any piece lies elsewhere than on the owner: known to every rank."""
        return any(
            pieces and member != unit.owner[1]
            for unit in self.units
            for member, pieces in enumerate(unit.pieces)
        )

    def _sent(self, member: int, owner: int) -> list[Item]:
        """What a member of the shard group sends to an owner, in the order it is packed."""
        if member == owner:
            return []
        return [(u, piece) for u in self.row if u.owner[1] == owner for piece in u.pieces[member]]


def plan_buckets(
    layouts: Sequence[Layout], devices: Sequence[torch.device], limit: int
) -> list[Bucket]:
    """Assign owners and fill buckets.

    A rank that holds all of a matrix owns it, if there is one, so that replicas and experts need
    no gathering.

    Args:
        layouts: One for each parameter.
        devices: Where each parameter is; a bucket is on one device.
        limit: Elements of whole matrices per owner and bucket; a larger matrix goes alone.
    """
    contexts: dict[tuple[Ranks, Ranks, torch.device], list[Unit]] = defaultdict(list)
    for index, (layout, device) in enumerate(zip(layouts, devices, strict=True)):
        for number, shape in enumerate(layout.shapes):
            pieces = tuple(member[number] for member in layout.pieces)
            unit = Unit(index, number, shape, pieces)
            contexts[layout.shard, layout.replicate, device].append(unit)
    return [
        bucket
        for (shard, replicate, device), units in contexts.items()
        for bucket in _fill(Bucket(shard, replicate, device), units, limit)
    ]


def _fill(bucket: Bucket, units: list[Unit], limit: int) -> Iterator[Bucket]:
    shard, replicate = bucket.shard, bucket.replicate
    units.sort(key=lambda u: (-polar_cost(*u.shape), u.shape, u.parameter, u.matrix))
    slots = shard.size * replicate.size
    balance, filled = Balance(slots), [0] * slots
    for unit in units:
        columns = unit.holders() or range(shard.size)
        candidates = [r * shard.size + c for r in range(replicate.size) for c in columns]
        slot = balance.lightest(candidates)
        if filled[slot] and filled[slot] + unit.numel > limit:
            yield bucket
            bucket, filled = Bucket(shard, replicate, bucket.device), [0] * slots
            balance.new_bucket()
            slot = balance.lightest(candidates)
        balance.give(slot, polar_cost(*unit.shape))
        filled[slot] += unit.numel
        unit.owner = divmod(slot, shard.size)
        bucket.units.append(unit)
    if bucket.units:
        yield bucket


def exchange(
    bucket: Bucket, read: Read, function: MatrixFunction, wire: torch.dtype
) -> Generator[None, None, Result]:
    """Apply ``function`` to every matrix of a bucket.

    Yields after each collective is launched, so that others can overlap it, and as often on every
    rank, so that all launch theirs in the same order.

    Args:
        bucket: From :func:`plan_buckets`.
        read: The input of a piece that this rank holds, (rows, cols); called once for each piece
            that this replica computes.
        function: Matrices, alone (m, n) or in a batch (k, m, n), to matrices in ``wire``.
        wire: Dtype on the wire, the one that ``function`` computes in: nothing is lost.

    Returns:
        This rank's pieces of all units, each with its part of the result.
    """
    me, mine = bucket.shard.index, bucket.mine
    inputs = {unit: _own_input(unit, bucket, read, wire) for unit in mine}
    if bucket.gathers:
        packed = _packed(bucket.outgoing, read, wire, bucket.device)
        received, work = _all_to_all(packed, bucket.outgoing, bucket.incoming, bucket.shard)
        yield
        work.wait()
        for (unit, piece), block in _unpacked(bucket.incoming, received):
            piece.of_matrix(inputs[unit]).copy_(block)
        del packed, received

    outputs = dict(zip(mine, in_batches(list(inputs.values()), function), strict=True))
    inputs.clear()
    results = {(unit, p): p.of_matrix(outputs[unit]) for unit in mine for p in unit.pieces[me]}
    if bucket.gathers:
        packed = _packed(bucket.incoming, lambda u, p: p.of_matrix(outputs[u]), wire, bucket.device)
        received, work = _all_to_all(packed, bucket.incoming, bucket.outgoing, bucket.shard)
        yield
        work.wait()
        results.update(_unpacked(bucket.outgoing, received))

    if bucket.replicate.size > 1:
        yield from _replicated(bucket, results, wire)
    return results


def _own_input(unit: Unit, bucket: Bucket, read: Read, wire: torch.dtype) -> Tensor:
    """The matrix on its owner: what it holds in one piece, or a buffer with its pieces."""
    pieces = unit.pieces[bucket.shard.index]
    if len(pieces) == 1 and pieces[0].numel == unit.numel:
        return read(unit, pieces[0])
    matrix = torch.empty(unit.shape, dtype=wire, device=bucket.device)
    for piece in pieces:
        piece.of_matrix(matrix).copy_(read(unit, piece))
    return matrix


def _replicated(bucket: Bucket, results: Result, wire: torch.dtype) -> Generator[None, None, None]:
    """Add what the other replicas computed: an all-gather, padded to the largest of them."""
    replicate = bucket.replicate
    counts = _counts(bucket.by_replica)
    width = max(counts)
    if width == 0:  # this rank and its replicas hold nothing, but their peers do
        yield
        return
    send = torch.zeros(width, dtype=wire, device=bucket.device)
    own = [bucket.by_replica[replicate.index]]
    for item, block in _unpacked(own, send):
        block.copy_(results[item])
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
    for indices in groups.values():
        if len(indices) == 1:
            results[indices[0]] = function(matrices[indices[0]])
        else:
            batch = function(torch.stack([matrices[i] for i in indices]))
            results.update(zip(indices, batch, strict=True))
    return [results[index] for index in range(len(matrices))]


def run_overlapped(steps: Iterable[Generator[None, None, None]], in_flight: int = 2) -> None:
    """Run generators to their ends, ``in_flight`` at a time, in the same order on every rank."""
    waiting = iter(steps)
    running: list[Generator[None, None, None]] = []
    exhausted = False
    while running or not exhausted:
        while len(running) < in_flight and not exhausted:
            following = next(waiting, None)
            if following is None:
                exhausted = True
            elif not _finished(following):
                running.append(following)
        running = [step for step in running if not _finished(step)]


def _finished(step: Generator[None, None, None]) -> bool:
    try:
        next(step)
    except StopIteration:
        return True
    return False
