"""The momentum filter and its place before or after the polar factor.

In: a gradient or a polar factor, and the buffer of its parameter. Out: the tensor that the next
stage reads. Every function works elementwise, so it runs on whatever shard of a parameter a rank
holds. The buffer ``exp_avg`` is the only thing written.

References: arXiv 2606.03899 for the orders; torch.optim.Muon for the form of the filter.
"""

from __future__ import annotations

from torch import Tensor


def before(order: str, grad: Tensor, exp_avg: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """What goes into the polar factor: the filtered gradient, or the gradient itself."""
    return momentum_filter(grad, exp_avg, momentum, nesterov) if order == "pre_polar" else grad


def after(order: str, factor: Tensor, exp_avg: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """What is applied: the filtered polar factor, or the polar factor itself."""
    return momentum_filter(factor, exp_avg, momentum, nesterov) if order == "post_polar" else factor


def momentum_filter(x: Tensor, exp_avg: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """M ← βM + (1−β)X in place, without bias correction; returns M, or (1−β)X + βM (Nesterov).

    Args:
        x: The input X, of any shape; not written.
        exp_avg: The buffer M, of the same shape; written. Its dtype is that of the arithmetic.
        momentum: β in [0, 1).
        nesterov: Look one step ahead.

    Returns:
        The filtered tensor. Without Nesterov it is ``exp_avg`` itself, not a copy.
    """
    x = x.to(exp_avg.dtype)
    exp_avg.lerp_(x, 1 - momentum)
    return x.lerp(exp_avg, momentum) if nesterov else exp_avg


def momentum_at(step: int, momentum: float, start: float, warmup_steps: int) -> float:
    """β at ``step`` (0 for the first): linear from ``start`` to ``momentum``, constant after."""
    if step >= warmup_steps:
        return momentum
    return start + (momentum - start) * step / warmup_steps
