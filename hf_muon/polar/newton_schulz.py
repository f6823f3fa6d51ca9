"""The polar factor by an odd matrix polynomial, applied to X itself.

In: X (…, s, l) with s <= l, contiguous, Frobenius norm at most one, in the compute dtype.
Out: an approximation of its polar factor, same shape and dtype.
With the ``quintic`` triples this is the iteration of torch.optim.Muon, operation for operation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .coefficients import Triple
from .kernels import addmm, gram_matrix


def newton_schulz(X: Tensor, triples: Sequence[Triple]) -> Tensor:  # (…, s, l) -> (…, s, l)
    """Apply p(X) = aX + (bA + cA²)X, A = XXᵀ, once per triple.

    Each singular value σ becomes p(σ) = aσ + bσ³ + cσ⁵ and the singular vectors stay. One step
    costs 4s²l + 2s³ floating-point operations.

    Args:
        X: wide matrices with singular values in [0, 1]; not modified.
        triples: the coefficients (a, b, c) of each step.

    Returns:
        The iterate after the last triple.

    References:
        Keller Jordan, https://kellerjordan.github.io/posts/muon/; arXiv 2505.16932, algorithm 1.
    """
    for a, b, c in triples:
        A = gram_matrix(X)  # (…, s, s)
        B = addmm(A, A, A, beta=b, alpha=c)  # (…, s, s)
        X = addmm(X, B, X, beta=a)  # (…, s, l)
    return X
