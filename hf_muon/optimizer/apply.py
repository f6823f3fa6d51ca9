"""Weight decay and the write.

In: weights, their directions and the numbers of the step. Out: the weights, changed in place. The
step-size factor enters here, in the last product, so that a direction in low precision is rounded
only once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_update(
    weights: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    cautious: bool,
) -> None:
    """W ← (1 − lr·λ)W − lr·scale·U, in place.

    Args:
        weights: Each W, of any shape; written.
        updates: Their U, of the same shapes.
        lr: Learning rate.
        scale: Step-size factor of the matrices.
        weight_decay: λ, decoupled from the gradient.
        cautious: Decay only the entries in which the decay and the update have the same
            direction, U·W > 0 (arXiv 2510.12402).
    """
    if weight_decay and cautious:
        for weight, update in zip(weights, updates, strict=True):
            agrees = (update * weight) > 0
            weight.sub_(weight * agrees, alpha=lr * weight_decay)
    elif weight_decay and weights[0].dtype.itemsize >= 4:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    elif weight_decay:
        for weight in weights:  # torch._foreach_mul_ would round the factor to the dtype, on a CPU
            weight.mul_(1 - lr * weight_decay)
    # In one call per tensor where dtypes differ, but without another rounding.
    torch._foreach_add_(weights, updates, alpha=-(lr * scale))
