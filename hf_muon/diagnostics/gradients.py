"""The gradients of a model, matrix by matrix.

In: a model, and batches or the gradients of a backward pass. Out: for each matrix that Muon trains,
by name, its gradient as a whole (m, n) matrix in float32. Gradients are copied, never written. On
sharded models every rank must call, because gathering a gradient is a collective.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_muon.distributed.layout import Matrix
from hf_muon.routing import route
from hf_muon.values import check_pattern, near

Sources = dict[str, tuple[nn.Parameter, Matrix]]
Loss = Callable[[nn.Module, Any], Tensor]


def muon_matrices(model: nn.Module, layers: str | Sequence[str] | None = None) -> Sources:
    """Return the matrices that Muon would train, by name.

    Args:
        model: Any module.
        layers: Regexes, one of which must match in the name. Default: all matrices.

    Returns:
        Parameter and region of each.

    Raises:
        ValueError: Nothing is routed to Muon, or a pattern matches none of the matrices.
    """
    plan = route(model)
    plan.require_matrices()
    found: Sources = {}
    for one, parameter in zip(plan.routes, plan.parameters, strict=True):
        for name, matrix in zip(names_of(one.name, one.matrices), one.matrices, strict=True):
            found[name] = (parameter, matrix)
    return {name: found[name] for name in matching(found, layers)}


def names_of(parameter: str, matrices: Sequence[object]) -> list[str]:
    """Name the matrices inside a parameter; the second of a stack is ``name[1]``."""
    if len(matrices) == 1:
        return [parameter]
    return [f"{parameter}[{number}]" for number in range(len(matrices))]


def parameter_of(name: str) -> str:
    """Return the name of the parameter that contains a matrix."""
    return re.sub(r"\[\d+\]$", "", name)


def matching(names: Collection[str], layers: str | Sequence[str] | None) -> list[str]:
    """Return the names in which one of some patterns matches; all names without patterns.

    Raises:
        ValueError: A pattern matches none, or is not a regular expression.
    """
    if layers is None:
        return list(names)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        check_pattern("layers", pattern)
        if not any(re.search(pattern, name) for name in names):
            words = sorted({step for name in names for step in name.split(".")} | set(names))
            raise ValueError(
                f"layers holds {pattern!r}, which matches none of the {len(names)} matrices that "
                f"Muon trains, such as {next(iter(names))}.{near(pattern.strip('^$.'), words)}"
            )
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def spread_evenly(names: Sequence[str], most: int) -> list[str]:
    """Return at most ``most`` of some names, evenly spaced from the first to the last."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / max(1, most - 1))] for i in range(most)]


def read_gradients(sources: Sources) -> dict[str, Tensor]:
    """Return copies of the gradients of a backward pass, in float32 or better.

    A parameter without a gradient counts as zero, as in the optimizer.

    Raises:
        RuntimeError: No parameter has a gradient.
    """
    if all(parameter.grad is None for parameter, _ in sources.values()):
        raise RuntimeError(
            "No matrix has a gradient. Read them after backward() and before zero_grad(); under "
            "DeepSpeed gradients never reach .grad: probe the model without it."
        )
    return {name: _matrix(parameter, matrix) for name, (parameter, matrix) in sources.items()}


def _matrix(parameter: nn.Parameter, matrix: Matrix) -> Tensor:  # -> (m, n)
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(matrix.rows, matrix.cols, device=parameter.device)
    if hasattr(gradient, "full_tensor"):  # a DTensor
        gradient = gradient.full_tensor()
    gradient = gradient.detach().contiguous()
    start = gradient.storage_offset() + matrix.offset  # a gradient may be a view of DDP's bucket
    region = gradient.as_strided(matrix.shape, matrix.strides, start)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return region.reshape(matrix.rows, matrix.cols).to(dtype, copy=True)


def gradient_buffers(
    model: nn.Module, batches: Iterable[Any], loss: Loss, sources: Sources
) -> dict[str, Tensor]:
    """Return one gradient per batch at fixed weights; then restore the model's own gradients.

    Returns:
        A buffer (K, m, n) for each matrix.

    Raises:
        ValueError: There are no batches.
        FloatingPointError: A gradient is NaN or infinite.
    """
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    taken: list[dict[str, Tensor]] = []
    try:
        for number, batch in enumerate(batches):
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss(model, batch).backward()  # type: ignore[no-untyped-call]
            taken.append(read_gradients(sources))
            for name, gradient in taken[-1].items():
                if not gradient.isfinite().all():
                    raise FloatingPointError(f"Batch {number} gives {name} a gradient with NaN.")
    finally:
        for parameter, before in kept:
            parameter.grad = before
    if not taken:
        raise ValueError("There are no batches to take gradients of.")
    return {name: torch.stack([one[name] for one in taken]) for name in sources}


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a transformers model on a dict of tensors, moved to its device."""
    device = next(model.parameters()).device
    on_device = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    loss: Tensor = model(**on_device).loss
    return loss
