"""Which parameters take part in a step, and whether their gradients can be trusted.

In: the entries of all param groups. Out: those that have a gradient, on which all ranks agree; or
an error on all of them, before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_muon.distributed.find import agreed, compute_device, is_dtensor, local
from hf_muon.distributed.layout import Ranks
from hf_muon.optimizer.entries import Entry


def agree_on_gradients(entries: Sequence[Entry], members: Sequence[Ranks]) -> list[Entry]:
    """The entries that have a gradient on any rank.

    Also the place where a bad gradient stops the step, on all ranks together and before anything
    is written. A finite norm of all gradients proves that every entry is finite, at the cost of one
    read; a norm that is not may also have overflowed, and only then are the entries looked at.

    Args:
        entries: Of all groups.
        members: The groups of ranks that must agree.

    Raises:
        ValueError: A gradient is sparse or complex.
        FloatingPointError: A gradient holds NaN or infinity on some rank.
    """
    problem = _problem(entries)
    found = [problem is not None, *(entry.tensor.grad is not None for entry in entries)]
    device = compute_device(entries[0].tensor, entries[0].flat is not None)
    flags = torch.tensor(found, dtype=torch.int32, device=device)
    any_problem, *active = agreed(flags, members).tolist()
    if any_problem:
        raise problem or FloatingPointError(
            "Another rank has a gradient that cannot be used: NaN, infinite, sparse or complex. No "
            "parameter and no state was changed; that rank's error names the parameter."
        )
    return [entry for entry, flag in zip(entries, active, strict=True) if flag]


def _problem(entries: Sequence[Entry]) -> Exception | None:
    """What is wrong with the gradients of this rank, if anything is."""
    given = [(entry, entry.tensor.grad) for entry in entries if entry.tensor.grad is not None]
    for entry, gradient in given:
        if gradient.is_sparse or gradient.is_complex():
            kind = "sparse" if gradient.is_sparse else "complex"
            return ValueError(
                f"The gradient of {entry.name} is {kind}; Muon and AdamW need dense real gradients "
                "(an embedding: sparse=False)."
            )
    if torch.isfinite(torch.nn.utils.get_total_norm([local(gradient) for _, gradient in given])):
        return None
    bad = [
        name
        for entry, gradient in given
        for name, part in entry.parts(local(gradient))
        if not torch.isfinite(part).all()
    ]
    return _non_finite(bad) if bad else None


def _non_finite(names: list[str]) -> FloatingPointError:
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return FloatingPointError(
        f"The gradient holds NaN or infinity in {listed}. No parameter and no state was changed. "
        "Lower the learning rate, clip gradients (max_grad_norm), or look for a division by zero "
        "in the loss; under float16, train with a gradient scaler (fp16=True)."
    )


def check_placement(entry: Entry, state: dict[str, Tensor]) -> None:
    """Raise for a Muon parameter whose matrices cannot be found, or whose state lies elsewhere.

    Launchers swap parameters for shards after the optimizer is built, so every step asks. A polar
    factor of a shard would be another algorithm.

    Raises:
        ValueError: Names the parameter and what to do.
    """
    if entry.flat is not None:
        return
    tensor, matrices = entry.tensor, entry.matrices
    expected = sum(matrix.numel for matrix in matrices)
    if tensor.ndim < 2 or tensor.numel() != expected:
        raise ValueError(
            f"{entry.name} is a flat shard: {type(tensor).__name__} of shape "
            f"{tuple(tensor.shape)}, where matrices of {expected} elements in all are expected. "
            "Muon trains whole tensors (one process, DDP), DTensors (FSDP2, tensor and expert "
            "parallelism) and the flat tensors of DeepSpeed ZeRO, not those of FSDP1: use FSDP2 "
            "(fsdp_version: 2)."
        )
    if len(matrices) > 1 and not local(tensor).is_contiguous():
        raise ValueError(
            f"{entry.name} holds several matrices and is not contiguous in memory: make it "
            "contiguous before training."
        )
    buffer = state.get("exp_avg")
    if buffer is not None and is_dtensor(buffer) != is_dtensor(tensor):
        raise ValueError(
            f"The momentum of {entry.name} is a {type(buffer).__name__} and the parameter a "
            f"{type(tensor).__name__}: load optimizer state after the model is sharded, through "
            "torch.distributed.checkpoint."
        )
