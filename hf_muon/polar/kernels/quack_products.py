"""Symmetric products by quack-kernels (https://github.com/Dao-AILab/quack), the rest by torch.

In: CUDA matrices in bfloat16 or float16. Out: their products. Imported on demand, because quack is
optional. Its ``gemm_symmetric`` needs rows that begin at multiples of 16 bytes; other matrices go
to torch's library.
"""

from __future__ import annotations

from quack.gemm_interface import gemm_symmetric
from torch import Tensor

from .products import Products, multiply, norm


def symmetric_product(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    beta: float = 0.0,
    alpha: float = 1.0,
    out: Tensor,
) -> Tensor:
    """The ``Product`` of a symmetric result."""
    if A.shape[-1] % 8 or out.shape[-1] % 8:
        return multiply(A, B, C, beta=beta, alpha=alpha, out=out)
    gemm_symmetric(A, B, C=C, out=out, alpha=float(alpha), beta=float(beta))
    return out


QUACK = Products("quack", multiply, symmetric_product, norm)
"""Symmetric products by quack."""
