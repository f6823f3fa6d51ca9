"""The same polynomial, worked out on the small Gram matrix and applied to X once per restart.

In: X (…, s, l) with s <= l, contiguous, Frobenius norm at most one, in the compute dtype.
Out: an approximation of its polar factor, same shape and dtype.
Fewer operations than ``newton_schulz`` where X is wide enough; nothing to gain where it is square.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .coefficients import Triple
from .kernels import addmm, gram_matrix

HALF_PRECISION = (torch.bfloat16, torch.float16)
FIRST_RUN = 2
"""Steps before the first restart: they stretch the spectrum most, and rounding of R with it."""
LONGEST_RUN = 3
"""Steps between later restarts in float32 and float64. In half precision it is two: rounding makes
zero eigenvalues of R negative, every step on the same R multiplies them by a², and a third step
lets singular values of rank-deficient matrices pass one by more than the tables allow for."""


def gram_newton_schulz(X: Tensor, triples: Sequence[Triple]) -> Tensor:  # (…, s, l) -> (…, s, l)
    """Return q_k(R) … q₁(R) X with R = XXᵀ and q(R) = aI + bR + cR², in short runs of steps.

    Inside a run only R and the product Q of the q's are kept (s × s): Q ← qQ, R ← qRq. At the end
    X ← QX, and the next run starts from a fresh XXᵀ. Matrix products accumulate in float32 or
    better in every compute dtype; R and Q are stored in the dtype of X. A run of k steps costs
    4s²l + (8k − 6)s³ floating-point operations.

    Args:
        X: wide matrices with singular values in [0, 1]; not modified.
        triples: the coefficients (a, b, c) of each step.

    Returns:
        The iterate after the last triple, equal to ``newton_schulz`` up to rounding.

    References:
        Zhang, Amsel, Chen and Dao, Gram Newton-Schulz, https://github.com/Dao-AILab/gram-newton-schulz
    """
    start = 0
    for length in run_lengths(len(triples), X.dtype):
        X = _run(X, triples[start : start + length])
        start += length
    return X


def run_lengths(steps: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Split steps into runs: five are 2 + 3 in float32 and 2 + 2 + 1 in half precision."""
    longest = FIRST_RUN if dtype in HALF_PRECISION else LONGEST_RUN
    lengths: list[int] = []
    while steps > 0:
        lengths.append(min(longest if lengths else FIRST_RUN, steps))
        steps -= lengths[-1]
    return tuple(lengths)


def _run(X: Tensor, triples: Sequence[Triple]) -> Tensor:  # (…, s, l) -> (…, s, l)
    (a, b, c), later = triples[0], triples[1:]
    R = gram_matrix(X)  # (…, s, s)
    Z = addmm(R, R, R, beta=b, alpha=c)  # (…, s, s), q = aI + Z
    if not later:
        return addmm(X, Z, X, beta=a)
    Q = Z.clone()  # (…, s, s)
    Q.diagonal(dim1=-2, dim2=-1).add_(a)
    for next_a, b, c in later:
        RQ = addmm(R, R, Z, beta=a)  # (…, s, s)
        R = addmm(RQ, Z, RQ, beta=a)  # (…, s, s), qRq
        a = next_a
        Z = addmm(R, R, R, beta=b, alpha=c)
        Q = addmm(Q, Z, Q, beta=a)
    return Q @ X
