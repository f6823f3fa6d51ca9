"""Matrix products that one matrix and a batch of matrices share.

In: matrices (…, m, n) with at most one batch dimension. Out: their products.
A single matrix goes through mm and addmm, the kernels torch.optim.Muon uses, so that results agree
with it bit for bit; a batch goes through bmm and baddbmm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram_matrix(X: Tensor) -> Tensor:  # (…, s, l) -> (…, s, s)
    """Return X Xᵀ."""
    return X @ X.mT


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
