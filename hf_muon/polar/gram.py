"""The same polynomial, computed on the small Gram matrix and applied to X once per run of steps.

In: X (…, s, l) with s <= l, contiguous, in the compute dtype, how to scale it, and temporaries.
Out: an approximation of its polar factor, same shape and dtype.
Needs fewer operations than ``newton_schulz`` where X is wide enough; gains nothing on square X.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .coefficients import Triple
from .kernels import Products
from .scale import Start

HALF_PRECISION = (torch.bfloat16, torch.float16)
FIRST_RUN = 2
"""Steps before the first restart: they stretch the spectrum most, and rounding of R with it."""
LONGEST_RUN = 3
"""Steps between later restarts in float32 and float64. In half precision it is two: rounding makes
zero eigenvalues of R negative, every step on the same R multiplies them by a², and a third step
lets singular values of rank-deficient matrices pass one by more than the tables allow for."""


def gram_newton_schulz(
    X: Tensor,
    spare: Tensor,
    squares: Tensor,
    triples: Sequence[Triple],
    start: Start,
    *,
    products: Products,
) -> Tensor:  # (…, s, l) -> (…, s, l)
    """Return q_k(R) … q₁(R) X with R = XXᵀ and q(R) = aI + bR + cR², in short runs of steps.

    Inside a run only R and the product Q of the q's are kept (s × s): Q ← qQ, R ← qRq. At the end
    X ← QX, and the next run starts from a fresh XXᵀ. Matrix products accumulate in float32 or
    better in every compute dtype; R and Q are stored in the dtype of X. A run of k steps costs
    4s²l + (8k − 6)s³ floating-point operations.

    Args:
        X: wide matrices; overwritten.
        spare: a temporary of the shape of X.
        squares: four temporaries, (4, …, s, s).
        triples: the coefficients (a, b, c) of each step.
        start: the scaling.
        products: how to multiply; all products but the last of a run are symmetric.

    Returns:
        The iterate after the last triple, equal to ``newton_schulz`` up to rounding: X or
        ``spare``.

    References:
        Zhang, Amsel, Chen and Dao, Gram Newton-Schulz, https://github.com/Dao-AILab/gram-newton-schulz
    """
    first = 0
    for length in run_lengths(len(triples), X.dtype):
        if first == 0:
            start(X, products=products, out=squares[0])
        else:
            products.gram(X, out=squares[0])
        Q = product_of(squares, triples[first : first + length], products)
        X, spare = products.general(Q, X, out=spare), X
        first += length
    return X


def run_lengths(steps: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Split the steps into runs: five become 2 + 3 in float32 and 2 + 2 + 1 in half precision."""
    longest = FIRST_RUN if dtype in HALF_PRECISION else LONGEST_RUN
    lengths: list[int] = []
    while steps > 0:
        lengths.append(min(longest if lengths else FIRST_RUN, steps))
        steps -= lengths[-1]
    return tuple(lengths)


def product_of(
    squares: Tensor, triples: Sequence[Triple], products: Products
) -> Tensor:  # (4, …, s, s) -> (…, s, s)
    """Return Q = q_k … q₁ for one run; R is the first of ``squares``, the rest are temporaries.

    The q's commute, because they are polynomials of one R.
    """
    product = products.symmetric
    R, Q, free, other = squares.unbind()
    q = factor_of(R, triples[0], products, out=Q)
    for triple in triples[1:]:
        product(R, q, out=free)
        product(q, free, out=R)
        q = factor_of(R, triple, products, out=other)
        Q, free = product(q, Q, out=free), Q
    return Q


def factor_of(R: Tensor, triple: Triple, products: Products, out: Tensor) -> Tensor:
    """Return q = aI + bR + cR², (…, s, s)."""
    a, b, c = triple
    q = products.polynomial(R, b, c, out=out)
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    return q
