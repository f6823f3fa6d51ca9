"""Scaling before the iteration, to singular values of at most one.

In: X (…, m, n) of any norm. Out: the same matrices at a norm that the iteration accepts.
Nothing here branches on the data, so nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from . import devices
from .kernels import Products

MARGIN = 1.01
"""Of the squared Schatten norm. It is rounded a few times, by at most 0.2 % each in bfloat16; what
that may leave above one is within the safety factor of the coefficients."""


def prescale(x: Tensor, out: Tensor) -> Tensor:  # (…, m, n) -> (…, m, n)
    """Write x to ``out``, each matrix multiplied by a suitable power of two.

    It brings the largest entry of a matrix to [1, 2), where no sum of squares or of fourth powers
    overflows or underflows float32. Powers of two are exact, so that the iteration computes the
    same bits as without them.

    Args:
        x: floating-point matrices; not modified, unless they are ``out``.
        out: contiguous, of the shape of x and the dtype to compute in.
    """
    may_overflow = torch.promote_types(x.dtype, out.dtype) != out.dtype
    if may_overflow:
        x = x * _suitable_power(x)
    if x is not out:
        # Converting and transposing are fast one after the other, and slow together.
        out.copy_(x if x.is_contiguous() else x.to(out.dtype))
    return out if may_overflow else out.mul_(_suitable_power(out))


def _suitable_power(X: Tensor) -> Tensor:  # (m, n) -> (), (k, m, n) -> (k, 1, 1)
    largest = _largest(X)
    if largest.dtype != torch.float64:
        largest = largest.float()
    factor = inverse_power_of_two(largest)
    return factor.bfloat16() if X.dtype == torch.bfloat16 else factor  # the same exponents


def _largest(X: Tensor) -> Tensor:
    """The largest absolute value of each matrix."""
    both = (-2, -1)
    if not devices.is_cpu(X.device):
        norm: Tensor = torch.linalg.vector_norm(X, math.inf, both, keepdim=X.ndim > 2)
        return norm
    # On a CPU vector_norm takes 40 times as long (torch 2.13), as does aminmax of a batch; X.abs()
    # would write a copy.
    low, high = torch.aminmax(X) if X.ndim == 2 else (X.amin(both, True), X.amax(both, True))
    return torch.maximum(high, -low)


def inverse_power_of_two(largest: Tensor) -> Tensor:
    """Return 2⁻ᵉ with 2ᵉ <= largest < 2ᵉ⁺¹, by arithmetic on the exponent bits.

    Exact on every device, which ``exp2`` and ``pow`` do not guarantee. Zero and subnormal numbers
    give the largest power that does not overflow.

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


def unit_frobenius_(
    X: Tensor, *, products: Products, out: Tensor
) -> Tensor:  # (…, s, l) -> (…, s, s)
    """Divide each matrix by its Frobenius norm, in place; return XXᵀ in ``out``.

    Zero stays zero.
    """
    X.div_(_norm(X, products))
    return products.gram(X, out=out)


def unit_schatten_(
    X: Tensor, *, products: Products, out: Tensor
) -> Tensor:  # (…, s, l) -> (…, s, s)
    """Divide each matrix by 1.005 times its Schatten 4-norm, in place; return XXᵀ in ``out``.

    Zero stays zero.

    (Σσ⁴)^¼ = ‖XXᵀ‖_F^½ bounds σ₁ far more tightly than (Σσ²)^½ does where many singular values are
    large, and XXᵀ is needed anyway. The margin covers its rounding.
    """
    if X.dtype == torch.float16:
        X.div_(_norm(X, products))  # XXᵀ would overflow
    A = products.gram(X, out=out)
    inverse = (MARGIN * _norm(A, products)).reciprocal()
    X.mul_(inverse.sqrt())
    return A.mul_(inverse)


def _norm(X: Tensor, products: Products) -> Tensor:
    # Zero divided by the smallest normal number is zero, and a scaled nonzero matrix has a larger
    # norm. It must be the smallest of X's dtype: on a device a scalar takes the matrix's dtype.
    return products.norm(X).clamp(min=torch.finfo(X.dtype).tiny)


class Start(Protocol):
    """A scaling to singular values of at most one."""

    def __call__(self, X: Tensor, *, products: Products, out: Tensor) -> Tensor:
        """Scale X (…, s, l) in place and return XXᵀ, (…, s, s), in ``out``."""


STARTS: dict[str, Start] = {"frobenius": unit_frobenius_, "schatten": unit_schatten_}
"""Scalings by the norm that they divide by."""
