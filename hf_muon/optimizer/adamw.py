"""The AdamW half: torch's own functional AdamW on a param group.

In: a param group and the optimizer's state. Out: the parameters and their two moments, changed in
place, exactly as torch.optim.AdamW would.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from hf_muon.distributed.find import is_dtensor, local


def adamw_step(
    group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Tensor]], active: list[Tensor]
) -> None:
    """Do one AdamW step (arXiv 1711.05101) on some parameters of a group.

    Args:
        group: Settings. ``momentum``, if a scheduler that cycles it (``OneCycleLR``, ``CyclicLR``)
            has written it, is β₁; ``fused=False`` keeps to torch's default kernels.
        state: Of each parameter.
        active: The parameters to train; a missing gradient counts as zero.
    """
    kinds: dict[tuple[bool, bool], list[tuple[Tensor, Tensor]]] = {}
    for p in active:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        fused = group.get("fused") is not False and _may_fuse(p, gradient, state[p])
        kinds.setdefault((is_dtensor(p), fused), []).append((p, gradient))
    for (_, fused), members in kinds.items():  # one kernel call takes no mixture
        _functional_adamw(group, members, [state[p] for p, _ in members], fused)


def _may_fuse(p: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether torch's fused kernel gives the right result here.

    It walks the memory of the four tensors in parallel and ignores their strides (torch 2.13), so
    it may pair the wrong entries, or write outside a slice.
    """
    first, *others = map(local, (p, gradient, state["exp_avg"], state["exp_avg_sq"]))
    kind = (first.dtype, first.device, first.shape)
    if any((x.dtype, x.device, x.shape) != kind for x in others):
        return False
    if not all(x.is_contiguous() for x in (first, *others)):
        strides = _strides(first)
        if not is_dense(first) or any(_strides(x) != strides for x in others):
            return False
    devices = _get_fused_kernels_supported_devices()
    return first.is_floating_point() and first.device.type in devices


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter: gradients have different ones in dimensions of one entry."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in pairs if size != 1]


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill the tensor's memory, in any order of dimensions."""
    dense = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != dense:
            return False
        dense *= size
    return True


def _functional_adamw(
    group: dict[str, Any],
    members: list[tuple[Tensor, Tensor]],
    states: list[dict[str, Tensor]],
    fused: bool,
) -> None:
    beta1, beta2 = group["betas"]
    for (p, _), state in zip(members, states, strict=True):
        # The fused kernel counts on its device; the others would wait for the device at each count.
        if fused or not state["step"].is_cpu:
            state["step"] = state["step"].to(p.device if fused else "cpu")
    adamw(
        [p for p, _ in members],
        [gradient for _, gradient in members],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=True if fused else None,
        amsgrad=False,
        beta1=group.get("momentum", beta1),
        beta2=beta2,
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
