"""Which matrices are orthogonalized in a batch and which one by one, without changing a bit.

In: shapes, matrices in batches, a function of whole matrices. Out: their results, in place. On a
CPU the result of a matrix must not depend on the other matrices, to the last bit: batched kernels
round like those for one matrix only within the bounds below.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import devices

# The number of elements and of rows, by bytes per element, from which a CPU orthogonalizes matrices
# one by one: a batch would be slower (scripts/bench/step.py --batching), and its symmetric
# products, which are not mirrored, would round differently.
_CPU_ALONE = {2: (2**18, 384), 4: (2**16, 256), 8: (2**16, 256)}
# Below these a CPU rounds alike in batches of two or more, but differently in a batch of one.
_CPU_IN_TWOS = (2**14, 32)


def batched(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Group indices of matrices by shape; in a group, n × m ones follow the m × n ones."""
    batches = alike(tuple(sorted(shape)) for shape in shapes).values()
    return [sorted(batch, key=lambda index: shapes[index]) for batch in batches]


def batched_alike(keys: Iterable[Hashable], device: torch.device) -> list[list[int]]:
    """Group indices of equal keys, for a function of several matrices; on a CPU one by one."""
    return list(alike(enumerate(keys) if devices.is_cpu(device) else keys).values())


def aligned(side: int, device: torch.device) -> int:
    """Return a side of a matrix padded to what an accelerator's products need.

    Rows must begin at multiples of 16 bytes, 8 numbers in half precision, and for Triton's large
    tiles at multiples of 32. Unaligned products reportedly take 3 to 100 times as long (LLaMA-1B
    has sides of 5461). Products with zeros are zero, so padding changes no other entry.
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
    """Replace the matrices of a batch by the results of a function.

    Args:
        function: replaces a matrix (m, n), or a batch (k, m, n), by its result.
        batch: contiguous memory (k, m, n); a matrix n × m is stored row by row in its (m, n).
        shapes: of each matrix, in the order of ``batched``. Matrices n × m are transposed where all
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
    """Whether matrices of a shape, and their transposes, go through a function in a batch."""
    if not devices.is_cpu(device):
        return True
    numel, rows = _CPU_ALONE[itemsize]
    return shape[0] * shape[1] < numel and min(shape) < rows


def _rounds_alone(shape: tuple[int, int]) -> bool:
    """Whether a CPU rounds a batch of one like a larger batch."""
    numel, rows = _CPU_IN_TWOS
    return shape[0] * shape[1] > numel and min(shape) >= rows


def _apply_wide(function: Callable[[Tensor], object], batch: Tensor, tall: int) -> None:
    """The same on an accelerator, in memory where all matrices are wide and have aligned sides.

    ``tall`` is how many of the last matrices have more rows than columns.
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
