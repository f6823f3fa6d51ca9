"""Which parameters take part in a step, and whether their gradients can be trusted.

In: param groups. Out: the indices of the parameters that have a gradient, on which all ranks agree;
or an error on all of them, before anything is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_muon.distributed.find import agreed, is_dtensor, local
from hf_muon.distributed.layout import Matrix, Ranks

Group = dict[str, Any]


def agree_on_gradients(groups: list[Group], replicate: Ranks) -> list[list[int]]:
    """For each group the indices of the parameters that have a gradient on any rank.

    Also the place where a bad gradient stops the step, on all ranks together and before anything
    is written. A finite norm of all gradients proves that every entry is finite, at the cost of one
    read; a norm that is not may also have overflowed, and only then are the entries looked at.

    Raises:
        ValueError: A gradient is sparse or complex.
        FloatingPointError: A gradient holds NaN or infinity on some rank.
    """
    members = [(group, index) for group in groups for index in range(len(group["params"]))]
    parameters = [group["params"][index] for group, index in members]
    for (group, index), p in zip(members, parameters, strict=True):
        _check_kind(group, index, p.grad)
    present = [p.grad is not None for p in parameters]
    bad = _non_finite([local(p.grad) for p in parameters if p.grad is not None])
    device = local(parameters[0]).device
    flags = torch.tensor([bool(bad), *present], dtype=torch.int32, device=device)
    any_bad, *active = agreed(flags, parameters, replicate).tolist()
    if any_bad:
        _raise_non_finite(members, parameters)
    chosen: list[list[int]] = [[] for _ in groups]
    where = [number for number, group in enumerate(groups) for _ in group["params"]]
    for number, (_, index), is_active in zip(where, members, active, strict=True):
        if is_active:
            chosen[number].append(index)
    return chosen


def _check_kind(group: Group, index: int, gradient: Tensor | None) -> None:
    if gradient is not None and (gradient.is_sparse or gradient.is_complex()):
        kind = "sparse" if gradient.is_sparse else "complex"
        raise ValueError(
            f"The gradient of {parameter_name(group, index)} is {kind}; Muon and AdamW need dense "
            "real gradients (an embedding: sparse=False)."
        )


def _non_finite(gradients: list[Tensor]) -> bool:
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return False
    return not all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _raise_non_finite(members: list[tuple[Group, int]], parameters: list[Tensor]) -> None:
    names = [
        parameter_name(group, index)
        for (group, index), p in zip(members, parameters, strict=True)
        if p.grad is not None and not torch.isfinite(local(p.grad)).all()
    ]
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise FloatingPointError(
        f"The gradient holds NaN or infinity in {listed or 'a shard of another rank'}. No "
        "parameter and no state was changed. Lower the learning rate, clip gradients "
        "(max_grad_norm), or look for a division by zero in the loss; under float16, train with a "
        "gradient scaler (fp16=True)."
    )


def check_placement(group: Group, index: int, state: dict[str, Tensor]) -> None:
    """Raise for a Muon parameter that is a flat shard, or whose state lies elsewhere.

    Launchers swap parameters for shards after the optimizer is built, so every step asks. A polar
    factor of a shard would be another algorithm.

    Raises:
        ValueError: Names the parameter and what to do.
    """
    if group["algorithm"] != "muon":
        return
    parameter = group["params"][index]
    expected = sum(Matrix(*matrix).numel for matrix in group["matrices"][index])
    if parameter.ndim < 2 or parameter.numel() != expected:
        raise ValueError(
            f"{parameter_name(group, index)} is a flat shard: {type(parameter).__name__} of shape "
            f"{tuple(parameter.shape)}, where matrices of {expected} elements in all are expected. "
            "Muon trains whole tensors (one process, DDP) and DTensors (FSDP2, tensor and expert "
            "parallelism), not yet the flat tensors of FSDP1 and DeepSpeed ZeRO: use FSDP2 "
            "(fsdp_version: 2)."
        )
    buffer = state.get("exp_avg")
    if buffer is not None and is_dtensor(buffer) != is_dtensor(parameter):
        raise ValueError(
            f"The momentum of {parameter_name(group, index)} is a {type(buffer).__name__} and the "
            f"parameter a {type(parameter).__name__}: load optimizer state after the model is "
            "sharded, through torch.distributed.checkpoint."
        )


def parameter_name(group: Group, index: int) -> str:
    """The name of a parameter, or its position and shape where the group has no names."""
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"parameter {index} of shape {tuple(group['params'][index].shape)}"
