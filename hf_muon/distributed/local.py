"""Apply a whole-matrix function where every matrix is whole on this rank.

In: tensors, the matrices inside each, and a function (…, m, n) → (…, m, n). Out: tensors of the
same shapes that hold the function's values. Matrices of one shape go through in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_muon.distributed.layout import Matrix

MatrixFunction = Callable[[Tensor], Tensor]


def apply_to_matrices(
    tensors: Sequence[Tensor], matrices: Sequence[Sequence[Matrix]], function: MatrixFunction
) -> list[Tensor]:
    """``function`` of each matrix of each tensor.

    Args:
        tensors: The inputs; not written.
        matrices: For each tensor, matrices that cover it.
        function: Maps matrices, alone (m, n) or in a batch (k, m, n), to others of that shape.

    Returns:
        For each tensor one of its shape, in the dtype that ``function`` returns.
    """
    if len(tensors) == 1 and len(matrices[0]) == 1 and tensors[0].ndim == 2:
        return [function(tensors[0])]
    inputs = [tensor.contiguous() for tensor in tensors]
    outputs: list[Tensor | None] = [None] * len(inputs)
    for (rows, cols), members in _by_shape(matrices).items():
        views = [matrix.view(inputs[index]).reshape(rows, cols) for index, matrix in members]
        results = function(torch.stack(views)) if len(views) > 1 else function(views[0])[None]
        for (index, matrix), result in zip(members, results, strict=True):
            output = outputs[index]
            if output is None:
                output = torch.empty_like(inputs[index], dtype=result.dtype)
                outputs[index] = output
            matrix.view(output).copy_(result.reshape(matrix.shape))
    return [output for output in outputs if output is not None]


def _by_shape(
    matrices: Sequence[Sequence[Matrix]],
) -> dict[tuple[int, int], list[tuple[int, Matrix]]]:
    """(rows, cols) -> the matrices of that shape, each with the index of its tensor."""
    groups: dict[tuple[int, int], list[tuple[int, Matrix]]] = defaultdict(list)
    for index, inside in enumerate(matrices):
        for matrix in inside:
            groups[matrix.rows, matrix.cols].append((index, matrix))
    return groups
