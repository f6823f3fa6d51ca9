"""Whole matrices from the pieces that ranks hold, for diagnostics; and the results of all ranks.

In: buckets of the matrices in question, and functions that read a piece of a gradient, a weight or
a momentum. Out: the whole matrices, each on one rank, so that diagnostics are divided among ranks
as training is. The layouts are those of a step: plain tensors, DTensors, flat tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Unit
from hf_muon.distributed.exchange import Read, gather, reading
from hf_muon.distributed.layout import Layout

_T = TypeVar("_T")


def some_of(layout: Layout, numbers: Sequence[int]) -> Layout:
    """Return the layout of some matrices of a parameter, in the order of ``numbers``."""
    pieces = tuple(tuple(member[number] for number in numbers) for member in layout.pieces)
    shapes = tuple(layout.shapes[number] for number in numbers)
    return dataclasses.replace(layout, shapes=shapes, pieces=pieces)


def whole_matrices(
    buckets: Iterable[Bucket], reads: Sequence[Read], dtype: torch.dtype
) -> Iterator[tuple[Unit, list[Tensor]]]:
    """Bring matrices together, bucket by bucket; every rank of the buckets must exhaust it.

    Args:
        buckets: From :func:`~hf_muon.distributed.buckets.plan_buckets`.
        reads: Functions; each returns a piece, (rows, cols), of one quantity.
        dtype: Of the results and on the wire.

    Yields:
        The units that this rank owns, with a whole (m, n) matrix for each of ``reads``.
    """
    for bucket in buckets:
        gathered = [_result_of(gather(bucket, reading(bucket, read), dtype)) for read in reads]
        for unit in bucket.mine:
            yield unit, [whole[unit] for whole in gathered]


def on_first_rank(values: _T) -> list[_T]:
    """Return the values of every rank on rank 0, and nothing elsewhere; all ranks must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [values]
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(values, parts)
    return parts or []


def _result_of(steps: Generator[None, None, _T]) -> _T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result
