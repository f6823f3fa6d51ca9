"""Momentum filters: averages of gradients, or of their polar factors.

In: the tensors to filter, and the buffers of their parameters, in lists, because for small tensors
one call each would take longer than the arithmetic. Out: the filtered tensors. Every function works
elementwise, on whatever pieces of parameters a rank holds. Only the buffers are written.

References: arXiv 2606.03899 for the orders; torch.optim.Muon for the form of the average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_muon.rules import FILTERS, KERNELS
from hf_muon.stages import Buffer, Given, Momentum, Stage, in_dtype_of


def ema(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """The filter of ``torch.optim.Muon``: M ← βM + (1−β)X; M, or (1−β)X + βM with Nesterov.

    No bias correction, because a polar factor has no scale. The arithmetic is in the dtype of the
    buffers.
    """
    [exp_avg] = buffers
    momentum: Any = given.momentum
    like = in_dtype_of(x, exp_avg)
    torch._foreach_lerp_(exp_avg, like, 1 - momentum)
    if not given.settings["nesterov"]:
        return exp_avg
    return list(torch._foreach_lerp(like, exp_avg, momentum))


FILTERS["ema"] = Stage(ema, (Buffer("exp_avg"),), may_fail=False)


def kernel(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Several weighted averages: m_k ← β_k·m_k + (1−β_k)X; M = Σ w_k·m_k.

    With Nesterov (1−μ)X + μM, where μ = Σ w_k·β_k is the weight of earlier inputs in M.
    """
    momenta: Any = given.momentum
    weights = weights_of(given.settings)
    like = in_dtype_of(x, buffers[0])
    for term, beta in zip(buffers, momenta, strict=True):
        torch._foreach_lerp_(term, like, 1 - beta)
    mixed = list(torch._foreach_mul(buffers[0], weights[0]))
    for term, weight in zip(buffers[1:], weights[1:], strict=True):
        torch._foreach_add_(mixed, term, alpha=weight)
    if not given.settings["nesterov"]:
        return mixed
    return list(torch._foreach_lerp(like, mixed, past_weight(momenta, weights)))


@lru_cache(maxsize=64)
def kernel_stage(terms: int, second: str) -> Stage:
    """Return the filter of several averages; ``second`` is the buffer name of the second one."""
    return Stage(kernel, tuple(map(Buffer, term_names(terms, second))), may_fail=False)


KERNELS["kernel"] = kernel_stage


def term_names(terms: int, second: str) -> list[str]:
    """Return the names of the buffers of several averages."""
    return ["exp_avg", second, *(f"exp_avg_{number}" for number in range(3, terms + 1))][:terms]


def weights_of(settings: Mapping[str, Any]) -> Sequence[float]:
    """Return the weights of the averages; equal weights if none are given."""
    terms = len(settings["momentum"])
    weights: Sequence[float] | None = settings["momentum_weights"]
    return weights or (1 / terms,) * terms


def past_weight(momenta: Sequence[float], weights: Sequence[float]) -> float:
    """Return μ = Σ w_k·β_k, the weight of all earlier inputs in the filter's output."""
    return sum(weight * beta for weight, beta in zip(weights, momenta, strict=True))


def single(settings: Mapping[str, Any], step: int) -> float:
    """Return β of the single average with the same mean age as the filter at a step (0 = first).

    The mean age of several averages is Σ w_k·β_k/(1−β_k), that of one is β/(1−β) = T − 1.
    """
    momentum = momentum_at(settings, step)
    if isinstance(momentum, str):
        return USUAL
    if isinstance(momentum, float):
        return momentum
    weights = weights_of(settings)
    age = sum(w * window(beta) for w, beta in zip(weights, momentum, strict=True)) - 1
    return max(0.0, 1 - 1 / (1 + age)) if age > -1 else 0.0


USUAL = 0.95
"""β where nothing else is known."""


def window(momentum: float) -> float:
    """Return T = 1/(1−β), the number of steps that the filter averages over."""
    return 1 / (1 - momentum)


def momentum_at(settings: Mapping[str, Any], step: int) -> Momentum:
    """Return β at a step (0 for the first); one value per average if there are several.

    It goes from ``momentum_start`` to ``momentum`` over ``momentum_warmup_steps``, and to
    ``momentum_end`` over ``momentum_cooldown_steps`` from step ``momentum_cooldown_start`` on.
    """
    momentum: Momentum = settings["momentum"]
    warmup, cooldown = settings["momentum_warmup_steps"], settings["momentum_cooldown_steps"]
    if step < warmup:
        return _between(settings, settings["momentum_start"], momentum, step / warmup)
    if cooldown and step > settings["momentum_cooldown_start"]:
        share = min(1.0, (step - settings["momentum_cooldown_start"]) / cooldown)
        return _between(settings, momentum, settings["momentum_end"], share)
    return momentum


def _between(settings: Mapping[str, Any], start: Any, end: Any, share: float) -> Momentum:
    if settings["momentum_schedule"] == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    if isinstance(end, tuple):
        return tuple(a + (b - a) * share for a, b in zip(start, end, strict=True))
    return float(start + (end - start) * share)
