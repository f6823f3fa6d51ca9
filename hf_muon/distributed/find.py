"""What a parameter is to the ranks: its layout, its local tensor, and who shares it.

In: parameters as the optimizer sees them at a step, plain or DTensor. Out: layouts, local tensors,
and the groups of ranks that train them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.layout import ALONE, Layout, Matrix, Ranks
from hf_muon.distributed.replicated import ranks_of, replicated_layout


def is_dtensor(tensor: Tensor) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor, without importing the class, which takes a second."""
    return hasattr(tensor, "placements")


def find_layout(
    parameter: Tensor, matrices: Sequence[Matrix], name: str, replicate: Ranks
) -> Layout:
    """The layout of a parameter; plain tensors are copies on the ranks of ``replicate``."""
    if is_dtensor(parameter):
        from hf_muon.distributed.dtensor import dtensor_layout

        return dtensor_layout(parameter, matrices, name)
    return replicated_layout(tuple(parameter.shape), matrices, replicate)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def locals_of(tensors: Iterable[Any]) -> list[Tensor]:
    """The same for many, without a call for each."""
    return [t.to_local() if hasattr(t, "placements") else t for t in tensors]


def local_gradient(parameter: Any) -> Tensor:
    """This rank's part of the gradient, placed like the parameter; zeros where there is none."""
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
    """The ranks of a replicate group; ``"world"`` is all of them, once they are known."""
    if not dist.is_initialized():
        return ALONE
    return ranks_of(dist.group.WORLD if isinstance(group, str) else group)


def sent_to(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Numbers as int32 on a device, without a wait for what it has to do before they arrive.

    From memory that is not pinned, a copy to a CUDA device waits.
    """
    pin = device.type == "cuda" and torch.cuda.is_available()
    here = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=pin)
    return here.to(device, non_blocking=True)


def agreed(flags: Tensor, members: Iterable[Ranks]) -> Tensor:
    """The flags that are set on any rank of some groups.

    Args:
        flags: Integers, of the same shape and meaning on every rank.
        members: Groups of ranks, in the same order on each of them.
    """
    for ranks in {ranks: None for ranks in members if ranks.size > 1}:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=ranks.group)
    return flags


def sharing_ranks(parameters: Iterable[Any], replicate: Ranks) -> list[Ranks]:
    """The groups of ranks that train some tensors together.

    Args:
        parameters: Plain tensors, of which ``replicate`` holds copies, and DTensors.
        replicate: Those ranks.
    """
    meshes = dict.fromkeys([p.device_mesh for p in parameters if hasattr(p, "device_mesh")])
    if not meshes:
        return [replicate]
    from hf_muon.distributed.dtensor import mesh_ranks

    return [replicate, *map(mesh_ranks, meshes)]


def compute_device(parameter: Any, flat: bool) -> torch.device:
    """Where matrices are computed and sent: the accelerator, also for what is offloaded to the CPU.

    Args:
        parameter: The tensor in the optimizer.
        flat: Whether it is a flat tensor of DeepSpeed.
    """
    device = local(parameter).device
    if flat:
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())
    if is_dtensor(parameter) and parameter.device_mesh.device_type != device.type:
        kind = parameter.device_mesh.device_type
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return device
