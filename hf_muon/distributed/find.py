"""How a parameter is distributed: its layout, its local tensor, and the ranks that share it.

In: parameters as the optimizer sees them in a step, plain or DTensor. Out: layouts, local tensors,
and the groups of ranks that train them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.layout import ALONE, Layout, Matrix, Ranks, pieces_in_box, ranks_of


def is_dtensor(tensor: Tensor) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor; does not import the class, which takes a second."""
    return hasattr(tensor, "placements")


def find_layout(
    parameter: Tensor, matrices: Sequence[Matrix], name: str, replicate: Ranks
) -> Layout:
    """Return a parameter's layout; the ranks of ``replicate`` hold copies of plain tensors."""
    if is_dtensor(parameter):
        from hf_muon.distributed.dtensor import dtensor_layout

        return dtensor_layout(parameter, matrices, name)
    held = [torch.arange(size, device="cpu") for size in parameter.shape]
    return Layout(
        shapes=tuple((matrix.rows, matrix.cols) for matrix in matrices),
        pieces=(tuple(pieces_in_box(matrix, parameter.shape, held) for matrix in matrices),),
        shard=ALONE,
        replicate=replicate,
    )


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def locals_of(tensors: Iterable[Any]) -> list[Tensor]:
    """The same for many tensors, without one call each."""
    return [t.to_local() if hasattr(t, "placements") else t for t in tensors]


def local_gradient(parameter: Any) -> Tensor:
    """Return this rank's part of the gradient, placed like the parameter; zeros if it has none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(local(parameter))
    if hasattr(gradient, "placements"):
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        gradient = gradient.to_local()
    contiguous: Tensor = gradient.contiguous()
    return contiguous


def replicate_ranks(group: dist.ProcessGroup | str | None) -> Ranks:
    """Return the ranks of a replicate group; ``"world"`` is all ranks, once there are any."""
    if not dist.is_initialized():
        return ALONE
    return ranks_of(dist.group.WORLD if isinstance(group, str) else group)


def sent_to(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Copy numbers to a device as int32, without waiting for the device's earlier work.

    They go through pinned memory: from other memory, a copy to a CUDA device waits.
    """
    pin = device.type == "cuda" and torch.cuda.is_available()
    here = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=pin)
    return here.to(device, non_blocking=True)


def agreed(flags: Tensor, members: Iterable[Ranks]) -> Tensor:
    """Return the flags that are set on any rank of some groups of several ranks.

    The flags are integers that mean the same on every rank; so does the order of the groups.
    """
    for ranks in members:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=ranks.group)
    return flags


def sharing_ranks(parameters: Iterable[Any], replicate: Ranks) -> list[Ranks]:
    """Return the groups of ranks that train some tensors together.

    The ranks of ``replicate`` hold copies of the plain tensors among them.
    """
    meshes = dict.fromkeys([p.device_mesh for p in parameters if hasattr(p, "device_mesh")])
    if not meshes:
        return [replicate]
    from hf_muon.distributed.dtensor import mesh_ranks

    return [replicate, *map(mesh_ranks, meshes)]


def compute_device(parameter: Any, flat: bool) -> torch.device:
    """Return where matrices are computed: the accelerator, even for weights offloaded to the CPU.

    ``flat`` says that the parameter is a flat tensor of DeepSpeed.
    """
    device = local(parameter).device
    if flat:
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())
    if is_dtensor(parameter) and parameter.device_mesh.device_type != device.type:
        kind = parameter.device_mesh.device_type
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return device
