"""Polar factors that overflow in half precision, detected without waiting for the device.

In: the results of an iteration, and its coefficients. Out: a flag for each matrix; the flagged ones
become zero. Rounding may push a singular value so far above one that the polynomial, of degree
five, throws it further with each step. Such a result has too large a norm, or is NaN. A single
singular value that is slightly too large goes unnoticed.
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
    """Where the flags of outliers go.

    Attributes:
        flags: receives a tensor (k,) from each iteration: the matrices that were set to zero.
        side: the shorter side of the matrices, where they are padded with zeros.
    """

    flags: list[Tensor]
    side: int | None = None


def zero_outliers_(
    factors: Tensor, triples: Sequence[Triple], side: int | None = None
) -> Tensor:  # (…, m, n) -> (k,)
    """Set to zero each matrix that is not finite, or whose norm exceeds what the triples allow.

    Args:
        factors: k approximate polar factors, (m, n) or (k, m, n).
        triples: the coefficients of the iteration.
        side: the shorter side of the matrices. Default: that of ``factors``.

    Returns:
        Flags for those that were set to zero.
    """
    bound = _longest(tuple(triples)) * math.sqrt(side or min(factors.shape[-2:]))
    norms = torch.linalg.vector_norm(factors, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    flags: Tensor = norms.le(bound).logical_not_()  # NaN compares false, so it is flagged
    factors.masked_fill_(flags, 0)
    return flags.view(-1)


@cache
def _longest(triples: tuple[Triple, ...]) -> float:
    return MARGIN * largest(triples)
