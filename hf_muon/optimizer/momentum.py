"""The momentum filter.

In: a gradient or a polar factor, and the buffer of its parameter. Out: the filtered tensor. Every
function works elementwise, so it runs on whatever piece of a parameter a rank holds. The buffer
``exp_avg`` is the only thing written.

References: arXiv 2606.03899 for the orders; torch.optim.Muon for the form of the filter.
"""

from __future__ import annotations

from torch import Tensor


def accumulate(x: Tensor, exp_avg: Tensor, momentum: float) -> None:
    """M ← βM + (1−β)X in place, without bias correction.

    Args:
        x: The input X, of any shape; not written.
        exp_avg: The buffer M, of the same shape; written. Its dtype is that of the arithmetic.
        momentum: β in [0, 1).
    """
    exp_avg.lerp_(x.to(exp_avg.dtype), 1 - momentum)


def filtered(x: Tensor, exp_avg: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """What the filter gives after :func:`accumulate`: M itself, or (1−β)X + βM (Nesterov)."""
    return x.to(exp_avg.dtype).lerp(exp_avg, momentum) if nesterov else exp_avg


def window(momentum: float) -> float:
    """T = 1/(1−β): the number of steps that the filter averages over."""
    return 1 / (1 - momentum)


def momentum_at(step: int, momentum: float, start: float, warmup_steps: int) -> float:
    """β at ``step`` (0 for the first): linear from ``start`` to ``momentum``, constant after."""
    if step >= warmup_steps:
        return momentum
    return start + (momentum - start) * step / warmup_steps
