"""The momentum filter.

In: gradients or polar factors, and the buffers of their parameters, in lists: a call for each would
take longer than its arithmetic where tensors are small. Out: the filtered tensors. Every function
works elementwise, so it runs on whatever pieces of parameters a rank holds. The buffers ``exp_avg``
are the only thing written.

References: arXiv 2606.03899 for the orders; torch.optim.Muon for the form of the filter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_muon.rules import FILTERS, Buffer, Given, Stage


def accumulate(x: list[Tensor], exp_avg: list[Tensor], momentum: float) -> None:
    """M ← βM + (1−β)X in place, without bias correction.

    Args:
        x: Inputs X, of any shapes; not written.
        exp_avg: The buffers M, of the same shapes; written. Their dtype is that of the arithmetic.
        momentum: β in [0, 1).
    """
    torch._foreach_lerp_(exp_avg, _like(x, exp_avg), 1 - momentum)


def filtered(
    x: list[Tensor], exp_avg: list[Tensor], momentum: float, nesterov: bool
) -> list[Tensor]:
    """What the filter gives after :func:`accumulate`: M itself, or (1−β)X + βM (Nesterov)."""
    return list(torch._foreach_lerp(_like(x, exp_avg), exp_avg, momentum)) if nesterov else exp_avg


def ema(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """The filter of ``torch.optim.Muon`` as a stage: M ← βM + (1−β)X; M, or (1−β)X + βM."""
    [exp_avg] = buffers
    momentum, like = given.momentum, _like(x, exp_avg)
    torch._foreach_lerp_(exp_avg, like, 1 - momentum)
    if not given.settings["nesterov"]:
        return exp_avg
    return list(torch._foreach_lerp(like, exp_avg, momentum))


FILTERS["ema"] = Stage(ema, (Buffer("exp_avg"),), may_fail=False)


def _like(x: list[Tensor], exp_avg: list[Tensor]) -> list[Tensor]:
    return [one.to(buffer.dtype) for one, buffer in zip(x, exp_avg, strict=True)]


def window(momentum: float) -> float:
    """T = 1/(1−β): the number of steps that the filter averages over."""
    return 1 / (1 - momentum)


def momentum_at(step: int, momentum: float, start: float, warmup_steps: int) -> float:
    """β at ``step`` (0 for the first): linear from ``start`` to ``momentum``, constant after."""
    if step >= warmup_steps:
        return momentum
    return start + (momentum - start) * step / warmup_steps
