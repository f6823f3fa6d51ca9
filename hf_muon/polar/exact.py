"""The polar factor by its definition, a singular value decomposition.

In: X (…, m, n) in float32 or float64. Out: UVᵀ over the nonzero singular values, same shape.
The reference for the iterations, and a method of its own for small matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def svd_polar(X: Tensor) -> Tensor:  # (…, m, n) -> (…, m, n)
    """Return U sign(Σ) Vᵀ for X = UΣVᵀ, where sign is 0 below max(m, n)·ε·σ₁ and 1 above.

    Singular values below that threshold cannot be told from rounding errors of the decomposition
    (the convention of ``torch.linalg.matrix_rank``), nor can their vectors: a rank-deficient
    matrix gives a partial isometry, zero gives zero.

    Args:
        X: real matrices, float32 or float64; not modified.

    Returns:
        The polar factor, shape and dtype of X.

    Raises:
        torch.linalg.LinAlgError: the decomposition does not converge, as for NaN entries.
    """
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)  # (…, m, s), (…, s), (…, s, n)
    threshold = max(X.shape[-2:]) * torch.finfo(X.dtype).eps * S[..., :1]  # (…, 1)
    kept = S.gt(threshold).to(X.dtype)  # (…, s); strict, since S and threshold of zero are zero
    factor: Tensor = (U * kept.unsqueeze(-2)) @ Vh
    return factor
