"""Where the matrices of a parameter are: inside it, and on which rank.

In: nothing. Out: plain data. :class:`Matrix` is a strided region of a whole parameter; routing
creates it and checkpoints carry it as nested tuples. :class:`Piece` is a block of a matrix in the
tensor that a rank holds. :class:`Layout` lists the pieces of every rank; code that works on layouts
does not know which library sharded the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Matrix(NamedTuple):
    """One matrix to orthogonalize: a strided region of a row-major parameter.

    Attributes:
        offset: Index of the first element.
        shape: ``(rows, cols)``. More leading dimensions count as one, so that the rows of a
            projection that is interleaved per head, ``(heads, head_dim, cols)``, are one matrix.
        strides: One stride for each entry of ``shape``.
        fan_out_dim: 0 if the rows are the outputs (``nn.Linear``), 1 if the columns are
            (``Conv1D``), None if the layer does not declare it.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    fan_out_dim: int | None

    @classmethod
    def whole(cls, shape: Iterable[int], fan_out_dim: int | None = 0) -> Matrix:
        """A parameter that is one matrix."""
        rows, cols = shape
        return cls(0, (rows, cols), (cols, 1), fan_out_dim)

    @property
    def rows(self) -> int:
        """Rows of the matrix as it is stored."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Columns of the matrix as it is stored."""
        return self.shape[-1]

    @property
    def numel(self) -> int:
        """Number of elements of the matrix."""
        return math.prod(self.shape)

    @property
    def last_index(self) -> int:
        """Index in the parameter of the last element, -1 if there is none."""
        steps = ((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + sum(steps) if self.numel else -1

    def row_indices(self) -> Tensor:
        """Index in the parameter of the first element of each row, (rows,)."""
        indices = torch.tensor(self.offset, device="cpu")
        for size, stride in zip(self.shape[:-1], self.strides[:-1], strict=True):
            indices = indices[..., None] + torch.arange(size, device="cpu") * stride
        return indices.reshape(-1)

    def col_indices(self) -> Tensor:
        """Distance of each column from the first one, (cols,)."""
        return torch.arange(self.cols, device="cpu") * self.strides[-1]


class Piece(NamedTuple):
    """A block of a matrix in a rank's tensor.

    The block is ``matrix[row : row + rows, col : col + cols]``. It starts at ``offset`` in the
    rank's tensor, counted in that tensor's row-major order, and has the two strides.
    """

    row: int
    col: int
    rows: int
    cols: int
    offset: int
    row_stride: int
    col_stride: int

    @property
    def numel(self) -> int:
        """Number of elements of the block."""
        return self.rows * self.cols

    def of_matrix(self, matrix: Tensor) -> Tensor:
        """The block as a view of the whole matrix, (rows, cols)."""
        if tuple(matrix.shape) == (self.rows, self.cols):
            return matrix
        return matrix[self.row : self.row + self.rows, self.col : self.col + self.cols]

    def of_local(self, local: Tensor) -> Tensor:
        """The block as a view of the rank's tensor, (rows, cols).

        Raises:
            ValueError: The block is part of a tensor that is not contiguous.
        """
        if self.offset == 0 and tuple(local.shape) == (self.rows, self.cols):
            return local
        if not local.is_contiguous():
            raise ValueError(
                f"A parameter of shape {tuple(local.shape)} is not contiguous in memory, so that "
                "its matrix, or its matrices, are not where they are expected (channels_last, or a "
                "transposed view): make it contiguous before training."
            )
        strides = (self.row_stride, self.col_stride)
        return local.as_strided(
            (self.rows, self.cols), strides, local.storage_offset() + self.offset
        )


@dataclass(frozen=True)
class Ranks:
    """Members of a process group, in the group's order, and this rank's place among them."""

    ranks: tuple[int, ...] = (0,)
    index: int = 0
    group: Any = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)


ALONE = Ranks()


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """Return the members of a process group; for None, this rank alone."""
    if group is None or dist.get_world_size(group) == 1:
        return ALONE
    return Ranks(tuple(dist.get_process_group_ranks(group)), dist.get_rank(group), group)


@dataclass(frozen=True)
class Layout:
    """Where the matrices of one parameter are.

    Attributes:
        shapes: (rows, cols) of each matrix.
        pieces: ``pieces[member][matrix]``: what each member of ``shard`` holds.
        shard: The ranks that together hold one copy.
        replicate: The ranks that hold the same pieces as this one.
        holders_own: Whether a rank that holds all of a matrix must compute it. Experts and copies
            then need no message. Flat partitions contain some whole matrices by accident; there,
            balancing the work is worth a message.
    """

    shapes: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]
    shard: Ranks
    replicate: Ranks
    holders_own: bool = True


def pieces_in_range(matrix: Matrix, start: int, stop: int, offset: int) -> tuple[Piece, ...]:
    """Pieces of a matrix in a flat tensor that holds a range of the row-major parameter.

    Args:
        matrix: The region.
        start: First element of the parameter that the rank holds.
        stop: One past the last.
        offset: Where the range begins in the rank's flat tensor.

    Returns:
        Blocks of whole rows, and parts of rows at the ends; nothing if the range does not touch
        the matrix.
    """
    if list(matrix.strides) == _row_major(matrix.shape):
        return _in_consecutive_rows(matrix, start, stop, offset)
    rows, step = matrix.row_indices(), matrix.strides[-1]
    first = ((start - rows).clamp(min=0) + step - 1).div(step, rounding_mode="floor")
    last = ((stop - rows).clamp(min=0) + step - 1).div(step, rounding_mode="floor")
    first, last = first.clamp(max=matrix.cols), last.clamp(max=matrix.cols)
    pieces = []
    for low, high in sorted(set(zip(first.tolist(), last.tolist(), strict=True))):
        if low < high:
            places = rows + low * step - start + offset
            for row, count, place, gap in _runs(places, (first == low) & (last == high)):
                pieces.append(Piece(row, low, count, high - low, place, gap, step))
    return tuple(pieces)


def _in_consecutive_rows(matrix: Matrix, start: int, stop: int, offset: int) -> tuple[Piece, ...]:
    """Return the end of a row, whole rows, the start of a row: fast, for thousands of ranks."""
    pieces = []
    here, end = max(start - matrix.offset, 0), min(stop - matrix.offset, matrix.numel)
    while here < end:
        row, col = divmod(here, matrix.cols)
        cols = min(matrix.cols - col, end - here)
        rows = (end - here) // cols if cols == matrix.cols else 1
        place = offset + matrix.offset + here - start
        pieces.append(Piece(row, col, rows, cols, place, matrix.cols, 1))
        here += rows * cols
    return tuple(pieces)


def pieces_in_box(
    matrix: Matrix, shape: Sequence[int], held: Sequence[Tensor]
) -> tuple[Piece, ...]:
    """Pieces of a matrix in a tensor that holds some of the indices of each dimension.

    Args:
        matrix: The region.
        shape: Shape of the whole parameter.
        held: For each dimension the global indices that the rank holds, ascending in local order.

    Returns:
        Blocks of rows times blocks of columns; nothing if the rank holds none of the matrix.

    Raises:
        ValueError: Rows and columns of the matrix share a dimension of the parameter.
    """
    places = [_inverse(indices, size) for indices, size in zip(held, shape, strict=True)]
    strides = _row_major([len(indices) for indices in held])
    rows, cols = matrix.row_indices(), matrix.col_indices()
    row_places = torch.unravel_index(rows, tuple(shape))
    col_places = torch.unravel_index(matrix.offset + cols, tuple(shape))
    row_local, col_local = torch.zeros_like(rows), torch.zeros_like(cols)
    row_held = torch.ones_like(rows, dtype=torch.bool)
    col_held = torch.ones_like(cols, dtype=torch.bool)
    for place, stride, of_rows, of_cols in zip(
        places, strides, row_places, col_places, strict=True
    ):
        along_cols = bool((of_cols != of_cols[0]).any())
        if along_cols and bool((of_rows != of_rows[0]).any()):
            raise ValueError(f"{matrix} is no block of a parameter of shape {tuple(shape)}.")
        if along_cols:
            col_local += place[of_cols] * stride
            col_held &= place[of_cols] >= 0
        else:
            row_local += place[of_rows] * stride
            row_held &= place[of_rows] >= 0
    return tuple(
        Piece(row, col, n_rows, n_cols, row_start + col_start, row_step, col_step)
        for row, n_rows, row_start, row_step in _runs(row_local, row_held)
        for col, n_cols, col_start, col_step in _runs(col_local, col_held)
    )


def _inverse(indices: Tensor, size: int) -> Tensor:
    """Return the local index of each global index, -1 if it is not held."""
    places = torch.full((size,), -1, device="cpu")
    places[indices] = torch.arange(len(indices), device="cpu")
    return places


def _row_major(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _runs(local: Tensor, held: Tensor) -> list[tuple[int, int, int, int]]:
    """Return (index, length, first local index, step) of each evenly spaced run of held entries."""
    indices = held.nonzero().flatten()
    if len(indices) == 0:
        return []
    values = local[indices]
    gaps = values.diff()
    step = int(gaps.mode().values) if len(gaps) else 1
    breaks = ((indices.diff() != 1) | (gaps != step)).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(indices)]
    return [
        (int(indices[start]), stop - start, int(values[start]), step)
        for start, stop in pairwise(bounds)
    ]
