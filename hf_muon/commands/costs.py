"""What a plan costs each rank: work, messages, memory.

In: a bucket of the plan. Out: a :class:`Cost` for every rank of the world, and sums of them. Owners
and pieces are read from the plan itself, so that these are the numbers of the run and not a model
of them; only memory is an estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from hf_muon.distributed.buckets import Bucket, Unit
from hf_muon.distributed.owners import polar_cost
from hf_muon.distributed.portions import portion_elements
from hf_muon.polar.together import computed_together


@dataclass(frozen=True)
class Cost:
    """What one rank does for a bucket, or for several.

    Attributes:
        matrices: Polar factors that it computes.
        operations: Of one Newton–Schulz iteration on each of them.
        exchanged: Bytes that it sends in all-to-alls.
        replicated: Bytes that it sends in all-gathers: what it contributes, with the padding to the
            largest contribution, once to every other replica.
        collectives: All-to-alls and all-gathers that it takes part in.
        waiting: Bytes of whole matrices and buffers while messages travel.
        computing: Bytes of whole matrices, and of the filter or the iteration, while it computes.
    """

    matrices: int = 0
    operations: int = 0
    exchanged: int = 0
    replicated: int = 0
    collectives: int = 0
    waiting: int = 0
    computing: int = 0

    @property
    def sent(self) -> int:
        """Bytes that it sends."""
        return self.exchanged + self.replicated

    @property
    def memory(self) -> int:
        """The most bytes at one time beyond weights, gradients and state; an estimate."""
        return max(self.waiting, self.computing)


@dataclass
class _Share:
    """What a rank owns, holds, sends to owners and gets as an owner; in elements."""

    owned: list[Unit] = field(default_factory=list)
    held: int = 0
    outgoing: int = 0
    incoming: int = 0


def bucket_costs(
    bucket: Bucket, mesh: tuple[int, int], itemsize: int, back: int | None = None
) -> list[Cost]:
    """The cost of a bucket for every rank.

    Args:
        bucket: From :func:`~hf_muon.distributed.buckets.plan_buckets`, of any rank.
        mesh: (replicas, shards) of the world. Where the bucket has one replica only, each does all
            of the work for itself.
        itemsize: Bytes of an element on the wire.
        back: Those of a result, on the way back. Default: the same.

    Returns:
        One cost for each rank; rank r is member ``r % shards`` of replica ``r // shards``.
    """
    replicas, shards = bucket.replicate.size, bucket.shard.size
    shares = [[_Share() for _ in range(shards)] for _ in range(replicas)]
    for unit in bucket.units:
        row, owner = shares[unit.owner[0]], unit.owner[1]
        row[owner].owned.append(unit)
        for member, numel in enumerate(unit.held):
            row[member].held += numel
            if member != owner:
                row[member].outgoing += numel
                row[owner].incoming += numel
    widths = [max(row[member].held for row in shares) for member in range(shards)]
    found = [
        [
            _cost(share, bucket, width if replicas > 1 else 0, itemsize, back or itemsize)
            for share, width in zip(row, widths, strict=True)
        ]
        for row in shares
    ]
    return [found[r % replicas][s % shards] for r in range(mesh[0]) for s in range(mesh[1])]


def _cost(share: _Share, bucket: Bucket, width: int, itemsize: int, back: int) -> Cost:
    owned = sum(unit.numel for unit in share.owned) * itemsize
    outgoing, incoming = share.outgoing * itemsize, share.incoming * itemsize
    row, copies = width * back, bucket.replicate.size
    # Results that came in fewer bytes are held in both forms for a moment.
    widened = (width * copies or share.outgoing) * itemsize if back < itemsize else 0
    read = sum(unit.numel for unit in share.owned) + share.outgoing - share.incoming
    iteration = _workspace(share.owned, bucket.device, itemsize)
    filtered = min(read, portion_elements(bucket.device)) * 4
    return Cost(
        matrices=len(share.owned),
        operations=sum(polar_cost(*unit.shape) for unit in share.owned),
        exchanged=outgoing + share.incoming * back,
        replicated=row * (copies - 1),
        collectives=2 * bucket.gathers + (width > 0),
        waiting=max(
            owned + outgoing + incoming,  # gathered, scattered
            owned + outgoing + row * (copies + 1) + widened,  # replicated
        ),
        computing=owned + max(iteration, outgoing + incoming + filtered),
    )


def _workspace(owned: Sequence[Unit], device: torch.device, itemsize: int) -> int:
    """Bytes that the iteration needs, at most, beside the matrices, which it replaces.

    Another iterate, and two squares; on the Gram matrix, where that is cheaper, four.
    """
    most = 0
    for (s, l), count in Counter(tuple(sorted(unit.shape)) for unit in owned).items():  # noqa: E741
        k = count if computed_together((s, l), itemsize, device) else 1
        most = max(most, k * (s * l + (4 if 2 * l > 3 * s else 2) * s * s))
    return most * itemsize


def in_flight(costs: Sequence[Cost]) -> Cost:
    """The cost of buckets for one rank, one of which computes while others wait for collectives.

    They follow each other at the distance of one collective, as in
    :func:`~hf_muon.distributed.exchange.run_overlapped`.
    """
    depth = 1 + max((cost.collectives for cost in costs), default=0)
    together = [costs[first : first + depth] for first in range(max(1, len(costs) - depth + 1))]
    return _sum(costs, computing=max(map(_memory, together)))


def _memory(costs: Sequence[Cost]) -> int:
    """The most that some buckets take, whichever of them computes or waits."""
    waiting = sum(cost.waiting for cost in costs)
    return waiting + max((cost.memory - cost.waiting for cost in costs), default=0)


def one_after_another(costs: Sequence[Cost]) -> Cost:
    """The cost of plans of which each ends before the next begins, for one rank."""
    return _sum(costs, computing=max((cost.memory for cost in costs), default=0))


def _sum(costs: Sequence[Cost], computing: int) -> Cost:
    total = {one.name: sum(getattr(cost, one.name) for cost in costs) for one in fields(Cost)}
    waiting = max((cost.waiting for cost in costs), default=0)
    return Cost(**{**total, "waiting": waiting, "computing": computing})
