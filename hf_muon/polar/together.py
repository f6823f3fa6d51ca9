"""Which matrices are given to a function together, which one by one, and that it changes no bit.

In: shapes, matrices in batches, a function of whole matrices. Out: their results, in place. On a
CPU what a matrix gets must not depend on what else there is, to the last bit: there batched kernels
round like those for one matrix within the bounds here and not beyond them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import devices

# Elements and rows, by the bytes of an element, from which a CPU orthogonalizes matrices one by
# one: a batch would be slower (scripts/bench/step.py --batching), and its symmetric products, which
# are not mirrored, would be rounded otherwise.
_CPU_ALONE = {2: (2**18, 384), 4: (2**16, 256), 8: (2**16, 256)}
# With fewer elements or rows a CPU rounds alike in batches of two or more, and otherwise in one.
_CPU_IN_TWOS = (2**14, 32)


def batched(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Indices of matrices by their shape; those of n × m come behind those of m × n."""
    batches = alike(tuple(sorted(shape)) for shape in shapes).values()
    return [sorted(batch, key=lambda index: shapes[index]) for batch in batches]


def batched_alike(keys: Iterable[Hashable], device: torch.device) -> list[list[int]]:
    """Indices of equal keys, for a function of several matrices; on a CPU one by one."""
    return list(alike(enumerate(keys) if devices.is_cpu(device) else keys).values())


def aligned(side: int, device: torch.device) -> int:
    """The side of a matrix with the zeros that an accelerator's products want beside it.

    They need rows that begin at multiples of 16 bytes, 8 numbers of half precision, and Triton's
    large tiles of 32 bytes: without, they are reported to take 3 to 100 times as long (LLaMA-1B has
    sides of 5461). Products with zeros are zeros, so that padding changes no other entry.
    """
    unit, step = (8, 8) if side <= 64 else (16, 64)
    if devices.is_cpu(device) or side % unit == 0:
        return side
    return -(-side // step) * step


def alike(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Indices of equal keys, by the key."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        found[key].append(index)
    return found


def apply_together(
    function: Callable[[Tensor], object], batch: Tensor, shapes: Sequence[tuple[int, int]]
) -> None:
    """Replace the matrices of a batch by what a function makes of them.

    Args:
        function: replaces a matrix (m, n), or a batch (k, m, n), by its result.
        batch: contiguous memory (k, m, n); one of n × m lies there row by row.
        shapes: of each matrix, in the order of ``batched``. Those of n × m are transposed where all
            are computed together.
    """
    shape = (batch.shape[1], batch.shape[2])
    if not computed_together(shape, batch.element_size(), batch.device):
        for matrix, own in zip(batch, shapes, strict=True):
            function(matrix.view(own))
    elif not devices.is_cpu(batch.device):
        _apply_wide(function, batch, sum(m > n for m, n in shapes))
    elif len(batch) > 1:
        across = batch[sum(own == shapes[0] for own in shapes) :]
        lying = across.view(-1, *reversed(shape))
        across.copy_(lying.mT.clone(memory_format=torch.contiguous_format))
        function(batch)
        lying.copy_(across.mT.clone(memory_format=torch.contiguous_format))
    elif _rounds_alone(shape):
        function(batch[0])
    else:
        twice = batch.repeat(2, 1, 1)
        function(twice)
        batch.copy_(twice[:1])


def computed_together(shape: tuple[int, int], itemsize: int, device: torch.device) -> bool:
    """Whether matrices of a shape, and its transposes, go through a function together."""
    if not devices.is_cpu(device):
        return True
    numel, rows = _CPU_ALONE[itemsize]
    return shape[0] * shape[1] < numel and min(shape) < rows


def _rounds_alone(shape: tuple[int, int]) -> bool:
    """Whether a CPU gives a batch of one the bits that a larger one gets."""
    numel, rows = _CPU_IN_TWOS
    return shape[0] * shape[1] > numel and min(shape) >= rows


def _apply_wide(function: Callable[[Tensor], object], batch: Tensor, tall: int) -> None:
    """The same on an accelerator, in memory where all are wide and have :func:`aligned` sides.

    Args:
        function: see :func:`apply_together`.
        batch: see there.
        tall: how many of the last ones have more rows than columns.
    """
    (s, l), wide = sorted(batch.shape[1:]), len(batch) - tall  # noqa: E741
    sides = aligned(s, batch.device), aligned(l, batch.device)
    if not tall and sides == (s, l):
        function(batch)
        return
    make = batch.new_empty if sides == (s, l) else batch.new_zeros
    room = make((len(batch), *sides))
    places = [
        (batch[:wide].view(wide, s, l), room[:wide, :s, :l]),
        (batch[wide:].view(tall, l, s), room[wide:, :s, :l].mT),
    ]
    for own, place in places:
        place.copy_(own)
    function(room)
    for own, place in places:
        own.copy_(place)
