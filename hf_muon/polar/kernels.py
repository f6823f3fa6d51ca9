"""Matrix products that one matrix and a batch of matrices share.

In: matrices (…, m, n) with at most one batch dimension. Out: their products.
A single matrix goes through mm and addmm, the kernels torch.optim.Muon uses, so that results agree
with it bit for bit; a batch goes through bmm and baddbmm. A product that is symmetric by
construction can be mirrored instead: its lower half is computed, in strips, and copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = {torch.float32: 128, torch.float64: 128}
HALF_PRECISION_ROWS = 192
"""Fewer rows in a strip cost a CPU more in the efficiency of its kernels than the half saves."""
MOST_STRIPS = 8
"""The share that is computed, (k + 1)/2k for k strips, is 0.56 by then."""


def gram_matrix(X: Tensor, *, mirror: bool) -> Tensor:  # (…, s, l) -> (…, s, s)
    """Return X Xᵀ."""
    return symmetric_product(X, X.mT, mirror=mirror)


def polynomial(A: Tensor, b: float, c: float, *, mirror: bool) -> Tensor:
    """Return bA + cA² for symmetric A (…, s, s)."""
    return symmetric_product(A, A, A, beta=b, alpha=c, mirror=mirror)


def symmetric_product(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    beta: float = 0.0,
    alpha: float = 1.0,
    mirror: bool,
) -> Tensor:
    """Return AB, or beta·C + alpha·AB, which the caller knows to be symmetric up to rounding.

    Args:
        A: shape (…, s, k).
        B: shape (…, k, s).
        C: shape (…, s, s), symmetric; None for AB alone.
        beta: factor of C.
        alpha: factor of the product that is added to it.
        mirror: where it pays (one large matrix on a CPU), compute the strips below the diagonal
            and mirror them, which saves up to 44 % of the operations.

    Returns:
        Shape (…, s, s), freshly allocated.
    """
    strips = strips_of(A) if mirror else 1
    if strips == 1:
        return A @ B if C is None else addmm(C, A, B, beta=beta, alpha=alpha)
    s = A.shape[0]
    product = A.new_empty(s, s)
    start = 0
    for stop in (s * (strip + 1) // strips for strip in range(strips)):
        rows, left = slice(start, stop), slice(0, stop)
        if C is None:
            torch.mm(A[rows], B[:, left], out=product[rows, left])
        else:
            torch.addmm(
                C[rows, left], A[rows], B[:, left],
                beta=beta, alpha=alpha, out=product[rows, left],
            )  # fmt: skip
        # Transposing is fast between contiguous tensors, and twice as slow between views.
        product[:start, rows] = product[rows, :start].contiguous().mT.contiguous()
        start = stop
    return product


def strips_of(A: Tensor) -> int:
    """Return into how many strips of rows a symmetric product of A (…, s, k) is cut; 1 for none."""
    if A.ndim > 2 or A.device.type != "cpu":
        return 1
    return min(MOST_STRIPS, max(1, A.shape[0] // ROWS.get(A.dtype, HALF_PRECISION_ROWS)))


def addmm(C: Tensor, A: Tensor, B: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """Return beta·C + alpha·A B.

    Args:
        C: shape (…, m, n).
        A: shape (…, m, k).
        B: shape (…, k, n).
        beta: factor of C.
        alpha: factor of the product.

    Returns:
        Shape (…, m, n), freshly allocated.
    """
    fused = torch.addmm if C.ndim == 2 else torch.baddbmm
    return fused(C, A, B, beta=beta, alpha=alpha)
