"""What a plan costs each rank: work, messages, memory.

In: a bucket of the plan. Out: a :class:`Cost` for each rank of the world, and sums of costs. Owners
and pieces come from the plan itself, so the numbers are exactly those of the run; only memory is an
estimate.
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
    """The cost of one bucket, or of several, for one rank.

    Attributes:
        matrices: Number of polar factors that it computes.
        operations: Floating-point operations of one Newton–Schulz iteration on each of them.
        exchanged: Bytes that it sends in all-to-alls.
        replicated: Bytes that it sends in all-gathers: its contribution, padded to the largest
            one, once to each other replica.
        collectives: Number of all-to-alls and all-gathers that it takes part in.
        waiting: Bytes of whole matrices and buffers while messages are in flight.
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
        """Bytes that it sends in all collectives."""
        return self.exchanged + self.replicated

    @property
    def memory(self) -> int:
        """Peak bytes beyond weights, gradients and state; an estimate."""
        return max(self.waiting, self.computing)


@dataclass
class _Share:
    """The units that a rank owns, and the elements that it holds, sends and receives."""

    owned: list[Unit] = field(default_factory=list)
    held: int = 0
    outgoing: int = 0
    incoming: int = 0


def bucket_costs(
    bucket: Bucket, mesh: tuple[int, int], itemsize: int, back: int | None = None
) -> list[Cost]:
    """Return the cost of a bucket for each rank.

    Args:
        bucket: From :func:`~hf_muon.distributed.buckets.plan_buckets`, of any rank.
        mesh: (replicas, shards) of the world. If the bucket has only one replica, each replica of
            the world does all of the work itself.
        itemsize: Bytes per element on the wire.
        back: Bytes per element of a result on its way back. Default: ``itemsize``.

    Returns:
        One cost per rank; rank r is member ``r % shards`` of replica ``r // shards``.
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
    # Results that travel in fewer bytes are briefly held in both dtypes.
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
    """Return the peak bytes that the iteration needs besides the matrices, which it overwrites.

    It needs another iterate and two square matrices; four if it iterates on the Gram matrix, which
    it does where that is cheaper.
    """
    most = 0
    for (s, l), count in Counter(tuple(sorted(unit.shape)) for unit in owned).items():  # noqa: E741
        k = count if computed_together((s, l), itemsize, device) else 1
        most = max(most, k * (s * l + (4 if 2 * l > 3 * s else 2) * s * s))
    return most * itemsize


def in_flight(costs: Sequence[Cost]) -> Cost:
    """Return the cost of overlapping buckets for one rank: one computes while others communicate.

    Each bucket starts one collective after the previous one, as in
    :func:`~hf_muon.distributed.exchange.run_overlapped`.
    """
    depth = 1 + max((cost.collectives for cost in costs), default=0)
    together = [costs[first : first + depth] for first in range(max(1, len(costs) - depth + 1))]
    return _sum(costs, computing=max(map(_memory, together)))


def _memory(costs: Sequence[Cost]) -> int:
    """Return the peak bytes of buckets in flight at once, whichever of them computes."""
    waiting = sum(cost.waiting for cost in costs)
    return waiting + max((cost.memory - cost.waiting for cost in costs), default=0)


def one_after_another(costs: Sequence[Cost]) -> Cost:
    """Return the cost for one rank of plans that run one after another."""
    return _sum(costs, computing=max((cost.memory for cost in costs), default=0))


def _sum(costs: Sequence[Cost], computing: int) -> Cost:
    total = {one.name: sum(getattr(cost, one.name) for cost in costs) for one in fields(Cost)}
    waiting = max((cost.waiting for cost in costs), default=0)
    return Cost(**{**total, "waiting": waiting, "computing": computing})
