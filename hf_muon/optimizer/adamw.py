"""The AdamW half: torch's own functional AdamW on a param group.

In: a param group and the optimizer's state. Out: the parameters and their two moments, changed in
place, exactly as torch.optim.AdamW would.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from hf_muon.distributed.find import is_dtensor


def has_fused_kernel(parameters: Iterable[Tensor]) -> bool:
    """Whether torch's fused AdamW runs on all of these parameters."""
    devices = _get_fused_kernels_supported_devices()
    return all(p.device.type in devices and p.is_floating_point() for p in parameters)


def new_state(parameter: Tensor, fused: bool) -> dict[str, Tensor]:
    """The state of a parameter before its first step; a fused kernel counts on its device."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def adamw_step(
    group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Tensor]], active: list[Tensor]
) -> None:
    """One AdamW step (arXiv 1711.05101) on parameters of a group; no gradient counts as zero."""
    for sharded in (False, True):  # a fused kernel takes no mixture
        params = [p for p in active if is_dtensor(p) is sharded]
        if params:
            _functional_adamw(group, params, [state[p] for p in params])


def _functional_adamw(
    group: dict[str, Any], params: list[Tensor], states: list[dict[str, Tensor]]
) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        params,
        [torch.zeros_like(p) if p.grad is None else p.grad for p in params],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=True if group["fused"] else None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
