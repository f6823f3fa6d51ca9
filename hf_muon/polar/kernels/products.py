"""The products and norms of an iteration, computed by torch's own library.

In: matrices (…, m, n) with at most one batch dimension, and where results go. Out: their products
and norms. A single matrix goes through mm and addmm, as in torch.optim.Muon, so that results agree
with it bit for bit; a batch goes through bmm and baddbmm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Product(Protocol):
    """A way to compute beta·C + alpha·AB, or AB where C is None."""

    def __call__(
        self,
        A: Tensor,
        B: Tensor,
        C: Tensor | None = None,
        *,
        beta: float = 0.0,
        alpha: float = 1.0,
        out: Tensor,
    ) -> Tensor:
        """Return beta·C + alpha·AB, or AB.

        Args:
            A: shape (…, m, k).
            B: shape (…, k, n).
            C: shape (…, m, n); None for AB alone, without beta and alpha.
            beta: multiplies C.
            alpha: multiplies AB.
            out: the result, (…, m, n); shares no memory with the others.
        """


@dataclass(frozen=True)
class Products:
    """How an iteration multiplies matrices and takes norms.

    Attributes:
        name: for logs.
        general: any product.
        symmetric: a product known to be symmetric up to rounding, as is its C.
        norm: the Frobenius norms of contiguous matrices, () or (k, 1, 1), in their dtype; in
            float32 for float16, where a sum of squares overflows.
        is_fixed: whether a matrix gets the same bits alone and in any batch, and symmetric
            products are exactly symmetric.
    """

    name: str
    general: Product
    symmetric: Product
    norm: Callable[[Tensor], Tensor]
    is_fixed: bool = False

    def gram(self, X: Tensor, *, out: Tensor) -> Tensor:  # (…, s, l) -> (…, s, s)
        """Return X Xᵀ."""
        return self.symmetric(X, X.mT, out=out)

    def polynomial(self, A: Tensor, b: float, c: float, *, out: Tensor) -> Tensor:
        """Return bA + cA² for symmetric A (…, s, s)."""
        return self.symmetric(A, A, A, beta=b, alpha=c, out=out)


def multiply(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    beta: float = 0.0,
    alpha: float = 1.0,
    out: Tensor,
) -> Tensor:
    """The :class:`Product` of torch."""
    if C is None:
        return torch.mm(A, B, out=out) if A.ndim == 2 else torch.bmm(A, B, out=out)
    fused = torch.addmm if A.ndim == 2 else torch.baddbmm
    return fused(C, A, B, beta=beta, alpha=alpha, out=out)


def norm(X: Tensor) -> Tensor:  # (m, n) -> (), (k, m, n) -> (k, 1, 1)
    """The norms, computed by torch.

    A single matrix uses the full-tensor norm, as torch.optim.Muon does; a batch may sum in another
    order.
    """
    dtype = torch.float32 if X.dtype == torch.float16 else None
    if X.ndim == 2:
        found: Tensor = X.norm(dtype=dtype)
    else:
        found = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=dtype)
    return found


TORCH = Products("torch", multiply, multiply, norm)
"""Products as torch's library computes them."""
