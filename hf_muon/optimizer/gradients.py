"""Which parameters take part in a step, and whether their gradients can be trusted.

In: param groups. Out: the indices of the parameters that have a gradient; or an error, before
anything is written.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_muon.distributed.layout import Matrix


def active_parameters(group: dict[str, Any]) -> list[int]:
    """Indices of the parameters of a group that have a gradient.

    Raises:
        ValueError: A gradient is sparse or complex.
    """
    active = []
    for index, p in enumerate(group["params"]):
        if p.grad is None:
            continue
        if p.grad.is_sparse or p.grad.is_complex():
            kind = "sparse" if p.grad.is_sparse else "complex"
            raise ValueError(
                f"The gradient of {parameter_name(group, index)} is {kind}; Muon and AdamW need "
                "dense real gradients (an embedding: sparse=False)."
            )
        active.append(index)
    return active


def check_finite(active: list[list[int]], groups: list[dict[str, Any]]) -> None:
    """Raise if any gradient holds NaN or infinity.

    A finite norm of all gradients proves that every entry is finite, at the cost of one read. A
    norm that is not may also have overflowed; only then are the entries looked at.

    Raises:
        FloatingPointError: Names the parameters.
    """
    members = [(group, i) for group, indices in zip(groups, active, strict=True) for i in indices]
    gradients = [group["params"][i].grad for group, i in members]
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return
    names = [
        parameter_name(group, i)
        for (group, i), gradient in zip(members, gradients, strict=True)
        if not torch.isfinite(gradient).all()
    ]
    if not names:
        return
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise FloatingPointError(
        f"The gradient holds NaN or infinity in {listed}. No parameter and no state was changed. "
        "Lower the learning rate, clip gradients (max_grad_norm), or look for a division by zero "
        "in the loss; under float16, train with a gradient scaler (fp16=True)."
    )


def check_whole(group: dict[str, Any], index: int) -> None:
    """Raise for a parameter of a Muon group whose matrices are not whole on this rank.

    Launchers swap parameters for shards after the optimizer is built, so this runs at the first
    step. A polar factor of a shard would be another algorithm.

    Raises:
        ValueError: Names the parameter and what to do.
    """
    parameter = group["params"][index]
    if group["algorithm"] != "muon":
        return
    expected = sum(Matrix(*matrix).numel for matrix in group["matrices"][index])
    # A DTensor has placements; its module takes a second to import, so its class is not asked for.
    if hasattr(parameter, "placements") or parameter.numel() != expected:
        raise ValueError(
            f"{parameter_name(group, index)} is sharded: {type(parameter).__name__} of shape "
            f"{tuple(parameter.shape)}, where matrices of {expected} elements in all are expected. "
            "This release of hf_muon trains whole tensors, in one process or under DDP. Launch "
            "with DDP, or choose another optimizer for FSDP, tensor parallelism and ZeRO."
        )


def parameter_name(group: dict[str, Any], index: int) -> str:
    """The name of a parameter, or its position and shape where the group has no names."""
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"parameter {index} of shape {tuple(group['params'][index].shape)}"
