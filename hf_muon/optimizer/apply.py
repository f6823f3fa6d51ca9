"""Weight decay and the write.

In: a weight, its update direction and the numbers of the step. Out: the weight, changed in place.
The step-size factor enters here, in the last product, so that a direction in low precision is
rounded only once.
"""

from __future__ import annotations

from torch import Tensor


def apply_update(
    weight: Tensor,
    update: Tensor,
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    cautious: bool,
) -> None:
    """W ← (1 − lr·λ)W − lr·scale·U, in place.

    Args:
        weight: W, of any shape; written.
        update: U, of the same shape.
        lr: Learning rate.
        scale: Step-size factor of the matrix.
        weight_decay: λ, decoupled from the gradient.
        cautious: Decay only the entries in which the decay and the update have the same
            direction, U·W > 0 (arXiv 2510.12402).
    """
    if weight_decay and cautious:
        agrees = (update * weight) > 0
        weight.sub_(weight * agrees, alpha=lr * weight_decay)
    elif weight_decay:
        weight.mul_(1 - lr * weight_decay)
    weight.add_(update, alpha=-(lr * scale))
