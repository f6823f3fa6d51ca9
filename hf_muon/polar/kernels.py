"""Matrix products that one matrix and a batch of matrices share.

In: matrices (…, m, n) with at most one batch dimension, and where results go. Out: their products.
A single matrix goes through mm and addmm, the kernels torch.optim.Muon uses, so that results agree
with it bit for bit; a batch goes through bmm and baddbmm. A product that is symmetric by
construction can be mirrored instead: its lower half is computed, in strips, and copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import devices

ROWS = {torch.float32: 128, torch.float64: 128}
HALF_PRECISION_ROWS = 192
"""Fewer rows in a strip cost a CPU more in the efficiency of its kernels than the half saves."""
MOST_STRIPS = 8
"""The share that is computed, (k + 1)/2k for k strips, is 0.56 by then."""


def gram_matrix(X: Tensor, *, mirror: bool, out: Tensor) -> Tensor:  # (…, s, l) -> (…, s, s)
    """Return X Xᵀ."""
    return symmetric_product(X, X.mT, mirror=mirror, out=out)


def polynomial(A: Tensor, b: float, c: float, *, mirror: bool, out: Tensor) -> Tensor:
    """Return bA + cA² for symmetric A (…, s, s)."""
    return symmetric_product(A, A, A, beta=b, alpha=c, mirror=mirror, out=out)


def symmetric_product(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    beta: float = 0.0,
    alpha: float = 1.0,
    mirror: bool,
    out: Tensor,
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
        out: the result, (…, s, s); shares no memory with the others.
    """
    strips = strips_of(A) if mirror else 1
    if strips == 1:
        return addmm(C, A, B, beta=beta, alpha=alpha, out=out)
    s, start = A.shape[0], 0
    for stop in (s * (strip + 1) // strips for strip in range(strips)):
        rows, left = slice(start, stop), slice(0, stop)
        block = None if C is None else C[rows, left]
        addmm(block, A[rows], B[:, left], beta=beta, alpha=alpha, out=out[rows, left])
        # Transposing is fast between contiguous tensors, and twice as slow between views.
        out[:start, rows] = out[rows, :start].contiguous().mT.contiguous()
        start = stop
    return out


def strips_of(A: Tensor) -> int:
    """Return into how many strips of rows a symmetric product of A (…, s, k) is cut; 1 for none."""
    if A.ndim > 2 or not devices.is_cpu(A.device):
        return 1
    return min(MOST_STRIPS, max(1, A.shape[0] // ROWS.get(A.dtype, HALF_PRECISION_ROWS)))


def addmm(
    C: Tensor | None, A: Tensor, B: Tensor, *, beta: float, alpha: float = 1.0, out: Tensor
) -> Tensor:
    """Return beta·C + alpha·A B, or A B where C is None.

    Args:
        C: shape (…, m, n).
        A: shape (…, m, k).
        B: shape (…, k, n).
        beta: factor of C.
        alpha: factor of the product.
        out: the result, (…, m, n); shares no memory with the others.
    """
    if C is None:
        return torch.mm(A, B, out=out) if A.ndim == 2 else torch.bmm(A, B, out=out)
    fused = torch.addmm if A.ndim == 2 else torch.baddbmm
    return fused(C, A, B, beta=beta, alpha=alpha, out=out)
