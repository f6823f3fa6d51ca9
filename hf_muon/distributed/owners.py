"""Which rank computes which polar factor: a cost model and a balanced assignment.

In: costs of matrices, and for each matrix the slots (ranks) that may own it. Out: a slot for each.
Only shapes and indices matter, so every rank gets the same answer without communication.
"""

from __future__ import annotations

from collections.abc import Sequence


def polar_cost(m: int, n: int) -> int:
    """Return the operations of a Newton–Schulz step on m × n: 4s²l + 2s³ with sides s ≤ l."""
    s, l = sorted((m, n))  # noqa: E741
    return 4 * s * s * l + 2 * s**3


# A rank keeps a matrix that it holds while its load stays below this multiple of the mean.
SLACK = 1.05


def assign_owners(
    costs: Sequence[int],
    candidates: Sequence[Sequence[int]],
    preferred: Sequence[int | None],
    slots: int,
) -> list[int]:
    """Return a slot for each matrix: the most expensive first, to the slot with the least work.

    Within 4/3 of the best makespan if all slots are candidates (Graham 1969).

    Args:
        costs: Of the matrices, in decreasing order.
        candidates: The slots that may own each matrix.
        preferred: A slot that needs no message for the matrix, or None. It owns the matrix while
            its load stays within 5 % of the mean, or below the largest single cost.
        slots: Number of slots.
    """
    load = [0] * slots
    enough = max([SLACK * sum(costs) / slots, *costs[:1]])
    owners = []
    for cost, allowed, favorite in zip(costs, candidates, preferred, strict=True):
        if favorite is not None and load[favorite] + cost <= enough:
            owner = favorite
        else:
            owner = min(allowed, key=lambda slot: (load[slot], slot))
        load[owner] += cost
        owners.append(owner)
    return owners


# Operations that a device does on polar factors in the time in which its link sends one byte.
# Orders of magnitude: 400 TFLOP/s over 50 GB/s; 100 GFLOP/s over 1 GB/s.
OPERATIONS_PER_BYTE = {"cuda": 8_000, "cpu": 100}


def owning_pays(m: int, n: int, steps: int, wire_bytes: int, device_type: str) -> bool:
    """Whether replicas should divide matrices and send results, rather than each compute all.

    Computing one element of an m × n polar factor costs steps·(4s + 2s²/l) operations, sending it
    ``wire_bytes``. Both shrink in the same proportion with the number of ranks.
    """
    operations = steps * polar_cost(m, n) / max(m * n, 1)
    return operations > wire_bytes * OPERATIONS_PER_BYTE.get(device_type, 8_000)
