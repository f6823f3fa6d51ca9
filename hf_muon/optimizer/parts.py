"""Portions of pieces, with the weights and buffers that belong to them.

In: the pieces of a bucket that a rank holds. Out: records and views that stay the same from step to
step.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hf_muon.distributed.buckets import Unit
from hf_muon.distributed.portions import Portion
from hf_muon.stages import Buffer, Given, Momentum, blocks_in


class Part(NamedTuple):
    """A portion of the pieces that share β and step-size factor, with data for every step."""

    portion: Portion
    momentum: Momentum
    scale: float
    weights: list[Tensor]
    kept: dict[str, list[Tensor]]
    shapes: list[tuple[int, int]]
    told: dict[int, Told]


Told = tuple[tuple[list[Tensor], ...], Given]
"""What a stage gets with a portion: its buffers, and what else it is told."""


def of_matrix(buffer: Buffer, unit: Unit, of_parameter: Tensor) -> Tensor:
    """Return one matrix's share of a buffer: (m, 1), (numbers,) or (m, blocks)."""
    of_one, (rows, cols) = of_parameter[unit.matrix], unit.shape
    if buffer.kind == "rows":
        return of_one[:rows, None]
    return of_one if buffer.kind == "numbers" else of_one[:rows, : blocks_in(cols)]
