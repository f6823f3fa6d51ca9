"""Steepest descent in the tangent space of the products BA, and the balancing of ‖A‖ and ‖B‖.

In and out: as in ``lora``. Balancing is not part of the changes, because it also rescales the
momentum. Given one number per pair, which follows from the norms of the whole A and B, it is
elementwise: every rank rescales its own pieces after the step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_muon.optimizer.lora import Pair, PolarFunction, whitening, with_split_decay
from hf_muon.polar import devices, in_own_dtype
from hf_muon.stages import wide


@torch.no_grad()
def tangent_update(
    weights: Pair,
    gradients: Pair,
    *,
    step: float | Tensor,
    decay: float | Tensor,
    damping: float,
    polar: PolarFunction,
    iterations: int,
) -> Pair:
    """LoRA-TSD: a spectral step of BA among the matrices X = B·dA + dB·A that A and B can reach.

    With S_A = AAᵀ, S_B = BᵀB, P_A = Aᵀ·S_A⁻¹·A and P_B = B·S_B⁻¹·Bᵀ, the nearest X to a matrix G
    is P(G) = P_B·G + G·P_A − P_B·G·P_A, at (dA, dB) as below. From X = P(M), τ times::

        G  ← O(X), the polar factor
        dB ← G·Aᵀ·S_A⁻¹
        dA ← S_B⁻¹·Bᵀ·G·(I − P_A)              X ← B·dA + dB·A

    and then A ← sA − η·dA/s, B ← sB − η·dB/s, s = √(1 − decay). Only Bᵀ·G and G·Aᵀ are needed,
    where M is the filtered gradient; and X = [B, dB]·[dA; A] has rank 2r, so that O works on a core
    of 2r by 2r. The inverses are damped as in :func:`~hf_muon.optimizer.lora.product_update`. As
    there, A or B stays as it is where the other is zero, and BA moves the same way for (kA, B/k).

    Args:
        weights: A (…, r, n) and B (…, m, r), of any floating dtype; not modified.
        gradients: M_A and M_B, of the same shapes: BᵀM and MAᵀ up to a common scale. After
            filtering this holds only approximately; P_B·M·P_A, which both contain, is taken from
            M_B. Zero gives no step.
        step: η, about the spectral norm of the change of BA.
        decay: lr·λ: the share of the product that is removed, in [0, 1).
        damping: δ, at least 1e-8.
        polar: Maps matrices (…, m, n) to their polar factors.
        iterations: τ, at least 1. More iterations bring the singular values of P(O(X)) closer to
            one.

    Returns:
        What to add to A and to B, in float32, or float64 for float64 weights.

    Raises:
        ValueError: ``decay``, ``damping`` or ``iterations`` is out of range.

    References:
        arXiv 2609.02734.
    """
    if iterations < 1:
        raise ValueError(f"tangent_update got iterations={iterations}; at least 1 is needed.")
    weights, gradients = Pair(*map(wide, weights)), Pair(*map(wide, gradients))
    dtype = weights.a.dtype
    with in_own_dtype(weights.a.device.type):
        whiten_a = whitening(weights.a, damping).to(dtype)  # (…, r, r)
        whiten_b = whitening(weights.b.mT, damping).to(dtype)
        # Orthonormal V for the rows of A and U for the columns of B: P_A = VᵀV and P_B = UUᵀ. In
        # these bases nothing depends on the scales of A and B.
        rows, columns = whiten_a @ weights.a, weights.b @ whiten_b.mT  # (…, r, n), (…, m, r)
        along = beside(whiten_b @ gradients.a, rows)  # UᵀG(I − P_A), (…, r, n)
        across = gradients.b @ whiten_a.mT  # GVᵀ, (…, m, r)
        for _ in range(iterations):
            left = torch.cat([columns, across], dim=-1)  # (…, m, 2r)
            right = torch.cat([along, rows], dim=-2)  # (…, 2r, n)
            left, right = polar_of_product(left, right, polar)
            along = beside((columns.mT @ left) @ right, rows)
            across = left @ (right @ rows.mT)
        change = Pair(whiten_b.mT @ along * -step, across @ whiten_a * -step)
    return with_split_decay(weights, change, decay)


def beside(X: Tensor, rows: Tensor) -> Tensor:  # (…, r, n) -> (…, r, n)
    """Return X(I − VᵀV): the part of X outside the span of the rows of V."""
    return X - (X @ rows.mT) @ rows


def polar_of_product(
    left: Tensor, right: Tensor, polar: PolarFunction
) -> tuple[Tensor, Tensor]:  # (…, m, k), (…, k, n) with k at most 2r
    """Return O(LR) as a product: the polar factor of a small core between orthonormal bases."""
    basis_left, core_left = orthonormal(left)  # (…, m, k), (…, k, 2r)
    basis_right, core_right = orthonormal(right.mT)
    core = polar(core_left @ core_right.mT).to(left.dtype)
    return basis_left @ core, basis_right.mT


def orthonormal(X: Tensor) -> tuple[Tensor, Tensor]:  # (…, m, k) -> (…, m, k), (…, k, k)
    """Return Q and R with X = QR: an orthonormal basis of the columns of X, and X in that basis.

    A CPU takes the QR decomposition. On other devices that is a sequence of small kernels for each
    column and matrix, and the basis comes from Gram matrices instead (CholeskyQR2): with the lower
    Cholesky factor L of XᵀX, Q = X·L⁻ᵀ and R = Lᵀ; then the same again for Q, whose condition
    number is nearly one.

    XᵀX may be singular, for example while B is zero, so s·I is added to it, with s just above its
    rounding. That does no harm. X = QR holds for any L, since Q is computed from it. A direction in
    which X has length σ gets length σ/√(σ² + s) in Q, and in the second round nearly one, down to
    σ ≈ s/‖X‖. A direction in which X is zero stays zero in Q, whatever R has there, so that the
    polar factor of what R contributes is multiplied by zero.

    Returns:
        Q and R in the dtype of X; from a CPU (…, m, min(m, k)) and (…, min(m, k), k).

    References:
        Yamamoto et al. (2015), ETNA 44; Fukaya et al. (2020), SIAM J. Sci. Comput. 42 (the shift).
    """
    if devices.is_cpu(X.device):
        Q, R = torch.linalg.qr(X)
        return Q, R
    rows = X.mT.to(devices.widest(X.device))  # (…, k, m)
    k, m = rows.shape[-2:]
    identity = torch.eye(k, dtype=rows.dtype, device=rows.device)
    R = identity
    eps = torch.finfo(rows.dtype).eps
    for _ in range(2 if rows.dtype == torch.float64 else 3):
        gram = rows @ rows.mT
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        shift = torch.where(trace > 0, (m + k) * eps * trace, 1.0)
        lower = torch.linalg.cholesky_ex(gram + shift * identity).L
        rows = torch.linalg.solve_triangular(lower, rows, upper=False)
        R = lower.mT @ R
    return rows.mT.to(X.dtype), R.to(X.dtype)


def balance_factor(squares_a: Tensor, squares_b: Tensor) -> Tensor:
    """Return the power of two next to √(‖B‖/‖A‖), which brings ‖A‖ and ‖B‖ within a ratio of two.

    Powers of two are exact in every dtype, so BA keeps its bits. Exact equality of the norms would
    round every weight, in bfloat16 by as much as a step is large. Updates of the product do not
    depend on the balance; it keeps A and B far from overflow, and at the sizes that another
    optimizer or dtype expects.

    Args:
        squares_a: ‖A‖², the sum of squares over the whole A, of any shape, in float64, or float32
            on devices without it.
        squares_b: ‖B‖², of the same shape.

    Returns:
        f for A ← f·A and B ← B/f, float32; 1 where A or B is zero.
    """
    exponent = (torch.log2(squares_b / squares_a) / 4).round()
    # exp2 may be off in the last digit of float64; rounded to float32 it is exact.
    return torch.where((squares_a > 0) & (squares_b > 0), exponent.exp2(), 1.0).float()


def rescale(weight: Tensor, kept: Iterable[Tensor], factor: Tensor) -> None:
    """W ← f·W and M ← M/f in place: momenta are gradients, which scale inversely.

    Elementwise, on whatever piece of a weight a rank holds: f for A, 1/f for B. Call it after a
    step, because gradients computed earlier no longer belong to the new weights.

    Args:
        weight: W, of any shape; written.
        kept: Each M, of the same shape; written.
        factor: f, a number from :func:`balance_factor`.
    """
    weight.mul_(factor.to(weight))
    for average in kept:
        average.div_(factor.to(average))
