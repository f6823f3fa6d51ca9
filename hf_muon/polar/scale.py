"""Scaling before the iteration: none too large or too small, and ordinary inputs keep their bits.

In: X (…, m, n) of any norm. Out: the same matrices at a norm the iteration accepts.
Nothing here branches on the data, so nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SAFE = 1e12
SMALLEST_SAFE = 1e-12
"""Largest entries between these bounds square and sum within float32's range, so that the matrix
needs no scaling and follows torch.optim.Muon bit for bit."""

TINIEST_NORM = 1e-30
"""Zero divided by this is zero. A scaled nonzero matrix has a norm above 1e-12, so that unlike
torch.optim.Muon's 1e-7 the bound never touches it."""


def prescale(X: Tensor, dtype: torch.dtype) -> Tensor:  # (…, m, n) -> (…, m, n)
    """Return a copy of X in ``dtype``, multiplied by a power of two where its entries demand it.

    The factor brings the largest entry of each matrix to [1, 2). It is one, hence without effect,
    while that entry lies in [1e-12, 1e12]; ahead of float16, whose range is far smaller, it always
    applies. Powers of two change no digit.

    Args:
        X: floating-point matrices; not modified.
        dtype: dtype of the result.

    Returns:
        A new tensor of the shape of X.
    """
    # torch 2.13's vector_norm(inf) says this in one call but is many times slower on a CPU, and
    # X.abs() would write a copy.
    both = (-2, -1)
    largest = torch.maximum(X.amax(both, keepdim=True), -X.amin(both, keepdim=True))  # (…, 1, 1)
    if largest.dtype != torch.float64:
        largest = largest.float()
    factor = inverse_power_of_two(largest)
    if dtype != torch.float16:
        ordinary = (largest >= SMALLEST_SAFE) & (largest <= LARGEST_SAFE)
        factor = torch.where(ordinary, 1.0, factor)
    if X.dtype == torch.bfloat16:
        factor = factor.bfloat16()  # the exponents of float32: still exact
    return (X * factor).to(dtype)


def inverse_power_of_two(largest: Tensor) -> Tensor:
    """Return 2⁻ᵉ with 2ᵉ <= largest < 2ᵉ⁺¹, by arithmetic on the exponent bits.

    Exact on every device, which ``exp2`` and ``pow`` do not promise. Zero and subnormal numbers get
    the largest power below overflow.

    Args:
        largest: non-negative float32 or float64.

    Returns:
        The same shape and dtype.
    """
    is_double = largest.dtype == torch.float64
    integer, digits, bias = (torch.int64, 52, 1023) if is_double else (torch.int32, 23, 127)
    one = 1 << digits  # exponent field 1: the smallest normal number
    exponent = largest.view(integer) & -one  # clears the digits; the sign bit is zero
    return (2 * bias * one - exponent).clamp(min=one).view(largest.dtype)


def unit_frobenius_(X: Tensor) -> Tensor:  # (…, m, n) -> (…, m, n)
    """Divide each matrix by its Frobenius norm, in place; zero stays zero.

    A single matrix takes the full-tensor norm, as torch.optim.Muon does; a batch may add in
    another order.
    """
    # float16 overflows in the sum of squares; the other dtypes keep their own norm.
    dtype = torch.float32 if X.dtype == torch.float16 else None
    if X.ndim == 2:
        norm = X.norm(dtype=dtype)
    else:
        norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=dtype)
    return X.div_(norm.clamp(min=TINIEST_NORM))
