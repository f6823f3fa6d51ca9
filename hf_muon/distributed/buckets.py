"""The plan of a step: which matrices travel together, and which rank computes each of them.

In: the layouts of some parameters. Out: buckets of units. A unit is one matrix with its owner;
matrices that are needed together form a team with one owner. The plan depends only on layouts, so
every rank computes the same plan without communication, and reads from it what to send and to
receive.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from hf_muon.distributed.layout import Layout, Piece, Ranks
from hf_muon.distributed.owners import assign_owners, polar_cost
from hf_muon.polar import batched, devices

_TRAVELLING_MB = 32
"""Messages are large enough by then, and others overlap them."""
_ALONE_MB = 512
"""Where nothing travels an accelerator waits for launches otherwise: a batch takes as many for one
matrix as for dozens."""
# On a CPU, a bucket takes hardly more memory than one large matrix, while small matrices are
# computed together: four megabytes of float32.
_ALONE_ON_CPU_ELEMENTS = 2**20


@dataclass(eq=False)
class Unit:
    """One matrix of one parameter, and its owner: (replica, member of the shard group)."""

    parameter: int
    matrix: int
    shape: tuple[int, int]
    pieces: tuple[tuple[Piece, ...], ...]
    holders_own: bool = True
    owner: tuple[int, int] = (0, 0)

    @property
    def numel(self) -> int:
        """Number of elements of the whole matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def held(self) -> list[int]:
        """Number of elements that each member of the shard group holds."""
        return [sum(piece.numel for piece in pieces) for pieces in self.pieces]


Item = tuple[Unit, Piece]
Team = list[Unit]
Place = tuple[int, int]
"""A matrix: the number of its parameter, and its own number there."""


@dataclass(eq=False)
class Bucket:
    """Matrices that travel together between the same ranks; ``back`` is the dtype of results."""

    shard: Ranks
    replicate: Ranks
    device: torch.device
    wire: torch.dtype = torch.float32
    units: list[Unit] = field(default_factory=list)
    back: torch.dtype | None = None  # None: the dtype of the inputs

    def only(self, units: list[Unit]) -> Bucket:
        """Return the bucket with some of its units; they keep their owners."""
        return Bucket(self.shard, self.replicate, self.device, self.wire, units, self.back)

    @cached_property
    def row(self) -> list[Unit]:
        """The units that this replica computes."""
        return [unit for unit in self.units if unit.owner[0] == self.replicate.index]

    @cached_property
    def mine(self) -> list[Unit]:
        """The units that this rank computes."""
        return [unit for unit in self.row if unit.owner[1] == self.shard.index]

    @cached_property
    def batches(self) -> list[list[Unit]]:
        """The units that this rank computes, grouped by shape; in a group, transposes come last."""
        batches = batched([unit.shape for unit in self.mine])
        return [[self.mine[index] for index in batch] for batch in batches]

    @cached_property
    def is_alone(self) -> bool:
        """Whether nothing needs to travel."""
        return self.shard.size == self.replicate.size == 1

    @cached_property
    def held(self) -> list[Item]:
        """This rank's pieces of all units."""
        return [(unit, piece) for unit in self.units for piece in unit.pieces[self.shard.index]]

    @cached_property
    def own(self) -> list[Item]:
        """This rank's pieces of the units that it computes."""
        return [(unit, piece) for unit in self.mine for piece in unit.pieces[self.shard.index]]

    def blocks(self, matrices: Mapping[Unit, Tensor]) -> list[Tensor]:
        """Return the blocks of :attr:`own` as views of whole matrices."""
        if self._are_whole:
            return [matrices[unit] for unit, _ in self.own]
        return [piece.of_matrix(matrices[unit]) for unit, piece in self.own]

    @cached_property
    def _are_whole(self) -> bool:
        return all((piece.rows, piece.cols) == unit.shape for unit, piece in self.own)

    @cached_property
    def reads(self) -> list[Item]:
        """This rank's pieces of the units that its replica computes; its own units come first."""
        return [*self.own, *chain.from_iterable(self.outgoing)]

    @cached_property
    def outgoing(self) -> list[list[Item]]:
        """For each member of the shard group, the pieces that this rank sends to it."""
        return [self._sent(self.shard.index, owner) for owner in range(self.shard.size)]

    @cached_property
    def incoming(self) -> list[list[Item]]:
        """For each member of the shard group, the pieces that this rank gets from it."""
        return [self._sent(member, self.shard.index) for member in range(self.shard.size)]

    @cached_property
    def by_replica(self) -> list[list[Item]]:
        """For each replica, this rank's pieces of the units that the replica computes."""
        return [
            [item for item in self.held if item[0].owner[0] == replica]
            for replica in range(self.replicate.size)
        ]

    @cached_property
    def gathers(self) -> bool:
        """Whether some rank holds a piece that it does not own; the same on every rank."""
        return any(
            pieces and member != unit.owner[1]
            for unit in self.units
            for member, pieces in enumerate(unit.pieces)
        )

    def _sent(self, member: int, owner: int) -> list[Item]:
        """Return the pieces that a shard-group member sends to an owner, in packing order."""
        if member == owner:
            return []
        return [(u, piece) for u in self.row if u.owner[1] == owner for piece in u.pieces[member]]


def bucket_elements(bucket_mb: float | Literal["auto"], bytes_each: int) -> tuple[int, int]:
    """Return how many elements fill a bucket that is communicated, and one in a single process.

    Args:
        bucket_mb: The user's bound in MiB; ``auto`` suits each of the two cases.
        bytes_each: Bytes per element, of everything that is brought together.
    """
    both = (_TRAVELLING_MB, _ALONE_MB) if bucket_mb == "auto" else (bucket_mb, bucket_mb)
    travelling, alone = (int(size * 2**20 / bytes_each) for size in both)
    return travelling, alone


def plan_buckets(
    layouts: Sequence[Layout],
    devices: Sequence[torch.device],
    limit: int,
    together: Sequence[tuple[Place, ...]] = (),
    wires: Sequence[torch.dtype] | None = None,
    alone: int | None = None,
) -> list[Bucket]:
    """Assign owners and fill buckets.

    Args:
        layouts: One for each parameter.
        devices: Where each parameter is computed; a bucket is on one device.
        limit: Elements of whole matrices per owner and bucket; a larger team raises it.
        together: Teams of matrices that one owner needs at the same time, and that are on the same
            ranks. They are adjacent in their bucket. Other matrices are teams of one.
        wires: The dtype in which each parameter travels; a bucket has one. Default: float32.
        alone: The limit where nothing travels; on a CPU at most 2²⁰ elements or one team.
            Default: ``limit``.
    """
    units = {
        (index, number): Unit(
            index, number, shape, tuple(of[number] for of in layout.pieces), layout.holders_own
        )
        for index, layout in enumerate(layouts)
        for number, shape in enumerate(layout.shapes)
    }
    teams = [[units.pop(place) for place in team] for team in together]
    teams += [[unit] for unit in units.values()]
    contexts: dict[tuple[Ranks, Ranks, torch.device, torch.dtype], list[Team]] = defaultdict(list)
    for team in teams:
        first = team[0].parameter
        layout, wire = layouts[first], torch.float32 if wires is None else wires[first]
        contexts[layout.shard, layout.replicate, devices[first], wire].append(team)
    buckets = []
    for (shard, replicate, device, wire), members in contexts.items():
        is_alone = shard.size == replicate.size == 1
        bound = alone if is_alone and alone is not None else limit
        most = _elements_of(members, bound, device, is_alone=is_alone)
        owned = _with_owners(members, shard.size, replicate.size)
        buckets += [Bucket(shard, replicate, device, wire, of) for of in _bucketfuls(owned, most)]
    return buckets


def _elements_of(teams: list[Team], limit: int, device: torch.device, *, is_alone: bool) -> int:
    """Return the capacity of a bucket that holds more than one team."""
    if is_alone and devices.is_cpu(device):
        return min(limit, _ALONE_ON_CPU_ELEMENTS)
    # The bucket of the largest team takes this much in any case. Smaller buckets would be more in
    # number, and in each of them some ranks would wait for the owner of a large team.
    return max([limit, *(sum(unit.numel for unit in team) for team in teams)])


def _cost(team: Team) -> int:
    return sum(polar_cost(*unit.shape) for unit in team)


def _with_owners(teams: list[Team], shards: int, replicas: int) -> list[Team]:
    """Return the teams by decreasing cost, each with its owner among all replicas."""
    teams.sort(key=lambda team: (-_cost(team), team[0].shape, team[0].parameter, team[0].matrix))
    candidates, preferred = [], []
    for team in teams:
        numel = sum(unit.numel for unit in team)
        held = [sum(parts) for parts in zip(*(unit.held for unit in team), strict=True)]
        holders = [member for member, part in enumerate(held) if part == numel]
        columns = holders if holders and team[0].holders_own else range(shards)
        candidates.append([r * shards + c for r in range(replicas) for c in columns])
        # Only the rank that holds most of a matrix saves most of the messages.
        saves = not team[0].holders_own and 2 * max(held) > numel
        preferred.append(held.index(max(held)) if saves else None)
    costs = [_cost(team) for team in teams]
    owners = assign_owners(costs, candidates, preferred, shards * replicas)
    for team, owner in zip(teams, owners, strict=True):
        for unit in team:
            unit.owner = divmod(owner, shards)
    return teams


def _bucketfuls(teams: list[Team], limit: int) -> Iterator[list[Unit]]:
    """Yield the k-th bucketful of all owners together, so that they get equal work if possible."""
    bucketfuls: list[list[Unit]] = []
    number: dict[tuple[int, int], int] = defaultdict(int)
    filled: dict[tuple[int, int], int] = defaultdict(int)
    for team in teams:
        owner, numel = team[0].owner, sum(unit.numel for unit in team)
        if filled[owner] and filled[owner] + numel > limit:
            number[owner] += 1
            filled[owner] = 0
        filled[owner] += numel
        if number[owner] == len(bucketfuls):
            bucketfuls.append([])
        bucketfuls[number[owner]] += team
    return iter(bucketfuls)
