"""The matrices inside a parameter, as plain data.

In: nothing. Out: :class:`Matrix`, a strided region of a parameter that is orthogonalized as one
m × n matrix. Routing writes matrices, the optimizer reads them, checkpoints carry them as plain
nested tuples. Offsets and strides count elements of the parameter in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """One matrix to orthogonalize: a strided region of a row-major parameter.

    Attributes:
        offset: Index of the first element.
        shape: ``(rows, cols)``; more leading dimensions are read as one, so that the rows of a
            projection that is interleaved per head, ``(heads, head_dim, cols)``, are one matrix.
        strides: One stride for each entry of ``shape``.
        fan_out_dim: 0 where the rows are the outputs (``nn.Linear``), 1 where the columns are
            (``Conv1D``), None where the layer does not say.
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
        """Elements of the matrix."""
        return math.prod(self.shape)

    def view(self, parameter: Tensor) -> Tensor:
        """The region as a view of a contiguous ``parameter``, of shape ``self.shape``."""
        offset = parameter.storage_offset() + self.offset
        return torch.as_strided(parameter, self.shape, self.strides, offset)
