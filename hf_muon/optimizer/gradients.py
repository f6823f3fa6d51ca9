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
    present = [p.grad is not None for p in parameters]
    problem = _problem(members)
    flags = [bool(problem), *present]
    device = local(parameters[0]).device
    agreement = agreed(torch.tensor(flags, dtype=torch.int32, device=device), parameters, replicate)
    any_problem, *active = agreement.tolist()
    if any_problem:
        raise problem or FloatingPointError(
            "Another rank has a gradient that cannot be used: NaN, infinite, sparse or complex. No "
            "parameter and no state was changed; that rank's error names the parameter."
        )
    chosen: list[list[int]] = [[] for _ in groups]
    where = [number for number, group in enumerate(groups) for _ in group["params"]]
    for number, (_, index), is_active in zip(where, members, active, strict=True):
        if is_active:
            chosen[number].append(index)
    return chosen


def _problem(members: list[tuple[Group, int]]) -> Exception | None:
    """What is wrong with the gradients of this rank, if anything is."""
    names, gradients = [], []
    for group, index in members:
        gradient = group["params"][index].grad
        if gradient is None:
            continue
        if gradient.is_sparse or gradient.is_complex():
            kind = "sparse" if gradient.is_sparse else "complex"
            return ValueError(
                f"The gradient of {parameter_name(group, index)} is {kind}; Muon and AdamW need "
                "dense real gradients (an embedding: sparse=False)."
            )
        names.append(parameter_name(group, index))
        gradients.append(local(gradient))
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return None
    bad = [
        name
        for name, gradient in zip(names, gradients, strict=True)
        if not torch.isfinite(gradient).all()
    ]
    return _non_finite(bad) if bad else None


def _non_finite(names: list[str]) -> FloatingPointError:
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return FloatingPointError(
        f"The gradient holds NaN or infinity in {listed}. No parameter and no state was changed. "
        "Lower the learning rate, clip gradients (max_grad_norm), or look for a division by zero "
        "in the loss; under float16, train with a gradient scaler (fp16=True)."
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
    if len(group["matrices"][index]) > 1 and not local(parameter).is_contiguous():
        raise ValueError(
            f"{parameter_name(group, index)} holds several matrices and is not contiguous in "
            "memory: make it contiguous before training."
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
