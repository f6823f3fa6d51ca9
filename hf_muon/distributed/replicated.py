"""Layouts of plain tensors: one process, or ranks that hold copies.

In: a shape, its matrices, and the ranks that hold copies. Out: a :class:`Layout` of whole pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from hf_muon.distributed.layout import ALONE, Layout, Matrix, Ranks, pieces_in_box


def replicated_layout(shape: Sequence[int], matrices: Sequence[Matrix], replicate: Ranks) -> Layout:
    """Return the layout in which every member of ``replicate`` holds every matrix."""
    held = [torch.arange(size, device="cpu") for size in shape]
    return Layout(
        shapes=tuple((matrix.rows, matrix.cols) for matrix in matrices),
        pieces=(tuple(pieces_in_box(matrix, shape, held) for matrix in matrices),),
        shard=ALONE,
        replicate=replicate,
    )


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """Return the members of a process group; for None, this rank alone."""
    if group is None or dist.get_world_size(group) == 1:
        return ALONE
    return Ranks(tuple(dist.get_process_group_ranks(group)), dist.get_rank(group), group)
