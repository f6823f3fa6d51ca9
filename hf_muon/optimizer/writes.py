"""Step rules: how an update changes the weights.

In: weights, their updates and the numbers of the step. Out: the weights, changed in place. The
step-size factor enters here, in the last product, so that an update in low precision is rounded
only once.
"""

from __future__ import annotations

from functools import reduce
from itertools import compress

import torch
from torch import Tensor

from hf_muon.polar import devices
from hf_muon.rules import WRITES
from hf_muon.stages import Buffer, Given, Stage, Statistic, in_dtype_of, square_norm, wide


def apply_update(
    weights: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float | Tensor,
    scale: float,
    weight_decay: float,
    cautious: bool,
) -> None:
    """W ← (1 − lr·λ)W − lr·scale·U, in place.

    Args:
        weights: Each W, of any shape; written.
        updates: Their U, of the same shapes.
        lr: Learning rate; a float64 tensor, (), if only the device reads it.
        scale: Step-size factor of the matrices.
        weight_decay: λ, decoupled from the gradient.
        cautious: Decay only the entries in which decay and update have the same direction,
            U·W > 0 (arXiv 2510.12402).
    """
    if isinstance(lr, Tensor):
        _apply_rate(weights, updates, lr, scale, weight_decay, cautious)
        return
    on_cpu, dtype = devices.is_cpu(weights[0].device), weights[0].dtype
    if weight_decay and cautious:
        for weight, update in zip(weights, updates, strict=True):
            agrees = (update * weight) > 0
            weight.sub_(weight * agrees, alpha=lr * weight_decay)
    elif weight_decay and (dtype.itemsize >= 4 or not on_cpu):
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    elif weight_decay:
        for weight in weights:  # torch._foreach_mul_ would round the number to the dtype
            weight.mul_(1 - lr * weight_decay)
    # On mixed dtypes foreach makes one call per tensor, but then nothing is rounded once more.
    for W, U in [(weights, updates)] if on_cpu else _in_few_calls(weights, updates):
        torch._foreach_add_(W, U, alpha=-(lr * scale))


_WORTH_A_LAUNCH = 2**21
"""Elements that an accelerator adds in the time that a launch of its own takes."""


def _in_few_calls(
    weights: list[Tensor], updates: list[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Group weights and updates; small updates get the weights' dtype, if it has all their digits.

    Copying large updates would take longer than the launches it saves.
    """
    dtype, given = weights[0].dtype, updates[0].dtype
    if dtype == given or torch.promote_types(dtype, given) != dtype:
        return [(weights, updates)]
    found = []
    for is_large in (False, True):
        fit = [(w.numel() >= _WORTH_A_LAUNCH) is is_large for w in weights]
        W, U = list(compress(weights, fit)), list(compress(updates, fit))
        if W:
            found.append((W, U if is_large else in_dtype_of(U, W)))
    return found


def _apply_rate(
    weights: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    scale: float,
    weight_decay: float,
    cautious: bool,
) -> None:
    """The same where a kernel cannot take lr as a number: lr·scale·U is rounded before it is added.

    Weights in half precision are rounded once, at the end.
    """
    W = list(map(wide, weights))  # the weights themselves if they are float32
    dtype = reduce(torch.promote_types, [w.dtype for w in W])
    U = in_dtype_of(updates, W)
    if weight_decay and cautious:
        decayed = [w * (u * w > 0) for w, u in zip(W, U, strict=True)]
        torch._foreach_sub_(W, torch._foreach_mul(decayed, (lr * weight_decay).to(dtype)))
    elif weight_decay:
        torch._foreach_mul_(W, (1 - lr * weight_decay).to(dtype))
    torch._foreach_sub_(W, torch._foreach_mul(U, (lr * scale).to(dtype)))
    if any(w is not weight for w, weight in zip(W, weights, strict=True)):
        torch._foreach_copy_(weights, W)


def additive(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """W ← (1 − ηλ)W − ηsU."""
    _apply(x, given, given.scale)
    return x


def change(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """W ← W + U: the change of a LoRA pair already contains rate, step size and decay."""
    torch._foreach_add_(list(given.weights), x)
    return x


def relative(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """W ← (1 − ηλ)W − η·U·‖W‖_F/‖U‖_F: a step changes W by the share η."""
    sizes = (_over(weight, update).sqrt() for weight, update in given.whole)
    _apply([u * size.to(u) for u, size in zip(map(wide, x), sizes, strict=True)], given, 1.0)
    return x


def _apply(updates: list[Tensor], given: Given, scale: float) -> None:
    settings = given.settings
    apply_update(
        list(given.weights),
        updates,
        lr=settings["lr"],
        scale=scale,
        weight_decay=settings["weight_decay"],
        cautious=settings["cautious_weight_decay"],
    )


def hyperball(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """W ← R(W − ηŨ)/‖W − ηŨ‖_F, Ũ = R·U/‖U‖_F, R = ‖W₀‖_F: W keeps its initial norm."""
    for weight, update, factors in zip(given.weights, x, given.whole, strict=True):
        numbers = wide(weight)
        of_weight, of_update = factors.to(numbers.dtype)[:2]
        weight.copy_(numbers * of_weight + wide(update) * of_update)
    return x


def _products(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Return ‖W‖², ‖U‖² and ⟨W, U⟩."""
    found = []
    for weight, update in zip(given.weights, x, strict=True):
        dtype = devices.widest(weight.device)
        both = (weight.to(dtype) * update.to(dtype)).sum()
        found.append(torch.stack([square_norm(weight), square_norm(update), both]))
    return found


def _both(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Return ‖W‖² and ‖U‖²."""
    return [
        torch.stack([square_norm(w), square_norm(u)]) for w, u in zip(given.weights, x, strict=True)
    ]


def _over(first: Tensor, second: Tensor) -> Tensor:
    return torch.where(second > 0, first / second, 0.0)


def _checked(sums: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    for (weight, _), step in zip(sums, given.steps, strict=True):
        _check_first(weight, step, given, "changes a share of a matrix")
    return sums


def _on_the_ball(
    sums: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given
) -> list[Tensor]:
    """Return what to multiply W and U by, from their products."""
    [radii] = buffers
    found = []
    for (weight, update, both), kept, step in zip(sums, radii, given.steps, strict=True):
        _check_first(weight, step, given, "keeps the norm that a matrix begins with")
        if step == 1:
            kept.copy_(weight.sqrt())
        radius = kept.to(weight.dtype)[0]
        size = given.settings["lr"] * radius * _over(torch.ones_like(update), update).sqrt()
        length = (weight - 2 * size * both + size.square() * update).sqrt()
        # At a rate of zero, with which loaders step to create state, do not round the weights.
        factor = radius / length if given.settings["lr"] else torch.ones_like(length)
        found.append(torch.stack([factor, -factor * size]))
    return found


def _check_first(square: Tensor, step: int, given: Given, why: str) -> None:
    """Raise for zeros; but not at a rate of zero, with which loaders step before loading weights.

    A warmup may also begin at zero, so the second step is checked too; later steps are not, because
    the check waits for the device.
    """
    name = given.settings["step_rule"]
    if step <= 2 and given.settings["lr"] and not square > 0:
        raise ValueError(
            f"A matrix of zeros cannot be trained with step_rule={name!r}, which {why} (the B of a "
            "LoRA adapter begins with zeros). Use step_rule='additive', or send the parameter to "
            "AdamW with adamw_params."
        )


WRITES["additive"] = Stage(additive, may_fail=False)
WRITES["change"] = Stage(change, may_fail=False)
WRITES["relative"] = Stage(
    relative,
    needs=Statistic(_both, _checked, width=2, of_input=False),
    may_fail=False,
    counts=True,
    may_refuse=True,
)
WRITES["hyperball"] = Stage(
    hyperball,
    (Buffer("radius", "numbers", scales=False),),
    Statistic(_products, _on_the_ball, width=3, of_input=False),
    may_fail=False,
    counts=True,
    may_refuse=True,
)
