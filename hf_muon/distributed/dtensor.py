"""Layouts of DTensors: FSDP2, HSDP, tensor and expert parallelism, and combinations of them.

In: a DTensor parameter and its matrices. Out: a :class:`Layout`. Mesh dimensions that shard the
tensor form the shard group, the others the replicate group. To find what a rank holds, the indices
of each tensor dimension go through the placements in DTensor's own order and with its own
splitting, so that uneven, empty and strided shards need no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from hf_muon.distributed.layout import ALONE, Layout, Matrix, Ranks, pieces_in_box, ranks_of


def dtensor_layout(parameter: DTensor, matrices: Sequence[Matrix], name: str) -> Layout:
    """Return the layout of a DTensor.

    Raises:
        ValueError: A placement does not determine which elements a rank holds.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    for placement in placements:
        if type(placement) not in (Shard, _StridedShard, Replicate):
            raise ValueError(
                f"{name} has the placement {placement}; Muon trains tensors that are sharded "
                "(Shard) or replicated (Replicate) over each dimension of their mesh."
            )
    sharding = [
        dim for dim, p in enumerate(placements) if not p.is_replicate() and mesh.size(dim) > 1
    ]
    copying = [dim for dim in range(mesh.ndim) if dim not in sharding and mesh.size(dim) > 1]
    shard = _ranks(mesh, sharding)
    pieces = []
    for rank in shard.ranks if shard is not ALONE else (dist.get_rank(),):
        coordinate = (mesh.mesh == rank).nonzero()[0].tolist()
        held = [
            _held(size, [(placements[d], mesh.size(d), coordinate[d]) for d in sharding], dim)
            for dim, size in enumerate(parameter.shape)
        ]
        pieces.append(tuple(pieces_in_box(matrix, parameter.shape, held) for matrix in matrices))
    shapes = tuple((matrix.rows, matrix.cols) for matrix in matrices)
    return Layout(shapes, tuple(pieces), shard, _ranks(mesh, copying))


def _held(size: int, splits: Sequence[tuple[Placement, int, int]], dim: int) -> Tensor:
    """Return the global indices along one tensor dimension that a rank holds, in local order."""
    indices = torch.arange(size, device="cpu")
    for placement, parts, part in splits:
        assert isinstance(placement, Shard | _StridedShard)
        if placement.dim == dim:
            # The same split, of a one-dimensional tensor.
            flat: Any = Shard(0)
            if isinstance(placement, _StridedShard):
                flat = _StridedShard(0, split_factor=placement.split_factor)
            indices = flat._split_tensor(indices, parts, with_padding=False, contiguous=False)[0][
                part
            ]
    return indices


def _ranks(mesh: DeviceMesh, dims: Sequence[int]) -> Ranks:
    """Return the ranks that differ from this one only in the given dimensions of a mesh."""
    if not dims:
        return ALONE
    if len(dims) == 1:
        group = mesh.get_group(dims[0])
    else:
        me = dist.get_rank()
        rest = [dim for dim in range(mesh.ndim) if dim not in dims]
        rows = mesh.mesh.permute(*rest, *dims).reshape(-1, math.prod(mesh.size(d) for d in dims))
        mine = next(row for row in rows.tolist() if me in row)
        group = _group_of(tuple(mine))
    return ranks_of(group)


# By the world they belong to, which destroy_process_group ends.
_groups: dict[Any, dist.ProcessGroup] = {}


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """Return a process group of these ranks; the world group if they are all ranks."""
    world = dist.group.WORLD
    assert world is not None
    if sorted(ranks) == list(range(dist.get_world_size())):
        return world
    if (world, ranks) not in _groups:
        _groups[world, ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return _groups[world, ranks]


def mesh_ranks(mesh: DeviceMesh) -> Ranks:
    """Return all ranks of a mesh."""
    return _ranks(mesh, [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1])
