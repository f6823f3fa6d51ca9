"""Which matrices are inside a parameter.

In: a parameter's shape, its owner and what the owner declares. Out: a tuple of
:class:`~hf_muon.distributed.layout.Matrix`: one for a linear layer, one per expert of a stack, one
per group of a flattened convolution, one per projection of a fused weight.
"""

from __future__ import annotations

import math

from torch import nn

from hf_muon.distributed.layout import Matrix

Matrices = tuple[Matrix, ...]


def whole(shape: tuple[int, ...], fan_out_dim: int | None = 0) -> Matrices:
    """A two-dimensional parameter that is one matrix."""
    return (Matrix.whole(shape, fan_out_dim),)


def stack(shape: tuple[int, ...], fan_out_dim: int | None) -> Matrices:
    """One matrix per index of the first of three dimensions."""
    entries, rows, cols = shape
    size = rows * cols
    return tuple(Matrix(e * size, (rows, cols), (cols, 1), fan_out_dim) for e in range(entries))


def part(
    shape: tuple[int, ...], dim: int, start: int, size: int, *, step: int = 1, offset: int = 0
) -> Matrix:
    """Some outputs of a matrix: ``size`` rows (dim 0) or columns (dim 1)."""
    rows, cols = shape
    if dim == 0:
        return Matrix(offset + start * cols, (size, cols), (step * cols, 1), dim)
    return Matrix(offset + start, (rows, size), (cols, step), dim)


def expert_fan_out(owner: nn.Module) -> int | None:
    """Return which dimension of one expert's matrix is the output; None if it is not declared.

    transformers' experts decorator sets ``is_transposed``. Without it, a module may store either
    layout, and the sizes do not tell which.
    """
    transposed = getattr(owner, "is_transposed", None)
    return int(transposed) if isinstance(transposed, bool) else None


def flattened_kernel(owner: nn.Module, shape: tuple[int, ...]) -> Matrices:
    """A convolution kernel as the matrices (out, in · window), one per group.

    A transposed convolution stores (in, out / groups, …): its rows are the inputs.
    """
    groups = int(getattr(owner, "groups", 1))
    rows, cols = shape[0] // groups, math.prod(shape[1:])
    if min(rows, cols) == 1:
        return ()
    return stack((groups, rows, cols), int(getattr(owner, "transposed", False)))


def columns_are_outputs(owner: nn.Module) -> bool:
    """Whether a linear layer stores (in, out), as GPT-2's ``Conv1D`` does."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(owner).__mro__
    )
