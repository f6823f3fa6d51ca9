"""Who computes which polar factor: a cost model and a balanced assignment.

In: costs of matrices, and for each the slots (ranks) that may own it. Out: a slot for each. Nothing
but shapes and indices decides, so every rank comes to the same answer without a word.
"""

from __future__ import annotations

from collections.abc import Sequence


def polar_cost(m: int, n: int) -> int:
    """Operations of a Newton–Schulz step on an m × n matrix: 4s²l + 2s³ with sides s ≤ l."""
    s, l = sorted((m, n))  # noqa: E741
    return 4 * s * s * l + 2 * s**3


class Balance:
    """Longest-processing-time-first assignment, with the load of earlier buckets as tie-breaker.

    Within 4/3 of the best makespan when matrices come in order of falling cost (Graham 1969).
    """

    def __init__(self, slots: int) -> None:
        self.total = [0] * slots
        self.here = [0] * slots

    def new_bucket(self) -> None:
        """Forget the load of this bucket; its ranks wait for each other at its end."""
        self.here = [0] * len(self.here)

    def lightest(self, candidates: Sequence[int]) -> int:
        """The candidate with the least work in this bucket, then in all, then the first."""
        return min(candidates, key=lambda slot: (self.here[slot], self.total[slot], slot))

    def give(self, slot: int, cost: int) -> None:
        """Add work to a slot."""
        self.here[slot] += cost
        self.total[slot] += cost


# Operations per second of a rank's polar factors over bytes per second of its link: what a device
# computes while it sends one byte. Orders of magnitude: 400 TFLOP/s over 50 GB/s; 100 GFLOP/s over
# 1 GB/s.
OPERATIONS_PER_BYTE = {"cuda": 8_000, "cpu": 100}


def owning_pays(m: int, n: int, steps: int, wire_bytes: int, device_type: str) -> bool:
    """Whether replicas that each compute some matrices and send them beat computing all of them.

    Computing one element of an m × n polar factor costs steps·(4s + 2s²/l) operations, sending it
    ``wire_bytes``; both shrink by the same factor with the number of ranks.
    """
    operations = steps * polar_cost(m, n) / max(m * n, 1)
    return operations > wire_bytes * OPERATIONS_PER_BYTE.get(device_type, 8_000)
