"""The polar factor by an odd matrix polynomial, applied to X itself.

In: X (…, s, l) with s <= l, contiguous, in the compute dtype, how to scale it, and temporaries.
Out: an approximation of its polar factor, same shape and dtype.
With ``unit_frobenius_``, the ``quintic`` triples and torch's products this is the iteration of
torch.optim.Muon, operation for operation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .coefficients import Triple
from .kernels import Products
from .scale import Start


def newton_schulz(
    X: Tensor,
    spare: Tensor,
    squares: Tensor,
    triples: Sequence[Triple],
    start: Start,
    *,
    products: Products,
) -> Tensor:  # (…, s, l) -> (…, s, l)
    """Apply p(X) = aX + (bA + cA²)X, A = XXᵀ, once per triple.

    Each singular value σ becomes p(σ) = aσ + bσ³ + cσ⁵; the singular vectors stay. One step costs
    4s²l + 2s³ floating-point operations.

    Args:
        X: wide matrices; overwritten.
        spare: a temporary of the shape of X.
        squares: two temporaries, (2, …, s, s).
        triples: the coefficients (a, b, c) of each step.
        start: the scaling.
        products: how to multiply; A and bA + cA² are symmetric.

    Returns:
        The iterate after the last triple: X or ``spare``.

    References:
        Keller Jordan, https://kellerjordan.github.io/posts/muon/; arXiv 2505.16932, algorithm 1.
    """
    A, B = squares.unbind()
    start(X, products=products, out=A)
    for step, (a, b, c) in enumerate(triples):
        if step > 0:
            products.gram(X, out=A)
        products.polynomial(A, b, c, out=B)
        X, spare = products.general(B, X, X, beta=a, out=spare), X
    return X
