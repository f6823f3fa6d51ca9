"""Polar factors that half precision has taken out of range, found without waiting for the device.

In: what an iteration has made of matrices, and its coefficients. Out: a flag for each; what is
flagged becomes zero. Rounding may push a singular value so far above one that the polynomial, of
fifth degree, throws it further with each step. Such a factor is too long as a whole, or NaN; a
single singular value that is a little too large is not noticed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .coefficients import Triple, largest

MARGIN = 1.1
"""Of the largest norm without rounding. What rounding adds is 0.02 at most (docs/polar.md)."""


class Watch(NamedTuple):
    """What finds the outliers among some factors.

    Attributes:
        flags: gets a tensor (k,) of each iteration: the matrices whose factor was replaced by zero.
        side: the shorter side of the matrices, where there are zeros around them.
    """

    flags: list[Tensor]
    side: int | None = None


def zero_outliers_(
    factors: Tensor, triples: Sequence[Triple], side: int | None = None
) -> Tensor:  # (…, m, n) -> (k,)
    """Replace by zero each factor that is not finite, or longer than any that the triples make.

    Args:
        factors: what the iteration has made of k matrices, (m, n) or (k, m, n).
        triples: its coefficients.
        side: the shorter side of the matrices. Default: that of the factors.

    Returns:
        Which ones were replaced.
    """
    bound = _longest(tuple(triples)) * math.sqrt(side or min(factors.shape[-2:]))
    norms = torch.linalg.vector_norm(factors, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    flags: Tensor = norms.le(bound).logical_not_()  # NaN is not less than anything
    factors.masked_fill_(flags, 0)
    return flags.view(-1)


@cache
def _longest(triples: tuple[Triple, ...]) -> float:
    return MARGIN * largest(triples)
