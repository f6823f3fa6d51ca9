"""Updates of LoRA pairs that act on the product BA instead of on A and B separately.

In: the whole A and B of ΔW = c·BA and their filtered gradients, each a :class:`Pair`. Out: the
changes of A and B, weight decay included, so that one rank can compute them and every rank can add
its piece to its piece of the weights. No weights are sent back. All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_muon.distributed.layout import Matrix
from hf_muon.optimizer.scaling import step_size
from hf_muon.polar import devices, in_own_dtype
from hf_muon.stages import wide

PolarFunction = Callable[[Tensor], Tensor]

SMALLEST_DAMPING = 1e-8
"""Gram matrices are factored in float64, with errors around r·1e-16 of the largest eigenvalue. This
part of the mean eigenvalue, which is at least 1/r of the largest, exceeds them up to r = 1000."""


class Pair(NamedTuple):
    """One tensor for A and one for B: weights, gradients, or changes."""

    a: Tensor  # (…, r, n)
    b: Tensor  # (…, m, r)


@torch.no_grad()
def product_update(
    weights: Pair,
    gradients: Pair,
    *,
    step: float | Tensor,
    decay: float | Tensor,
    damping: float,
    polar: PolarFunction,
) -> Pair:
    """LoRA-Muon: half of a spectral step of BA through each of A and B.

    With S_A = AAᵀ, S_B = BᵀB, filtered gradients M and the polar factor O::

        dA = −(η/2)·S_B^(−½)·O(S_B^(−½)·M_A)        A ← sA + dA/s
        dB = −(η/2)·O(M_B·S_A^(−½))·S_A^(−½)        B ← sB + dB/s        s = √(1 − decay)

    B·dA and dB·A have spectral norm η/2 whatever the scales of A, B and M, so that BA moves the
    same way for (kA, B/k). The roots are those of S + δ·(tr S/r)·I: with a singular S the step
    could grow without bound, and a δ that is not relative to S would make it depend on k. Where A
    or B is zero, the other has a zero gradient and stays as it is, without decay.

    Args:
        weights: A (…, r, n) and B (…, m, r), of any floating dtype; not modified.
        gradients: M_A and M_B, of the same shapes; zero gives no step.
        step: η, about the spectral norm of the change of BA; see :func:`pair_step_size`.
        decay: lr·λ: the share of the product that is removed, in [0, 1).
        damping: δ, at least 1e-8.
        polar: Maps matrices (…, m, n) to their polar factors.

    Returns:
        What to add to A and to B, in float32, or float64 for float64 weights.

    Raises:
        ValueError: ``decay`` or ``damping`` is out of range.

    References:
        arXiv 2606.12921, which writes the product as ABᵀ.
    """
    weights, gradients = Pair(*map(wide, weights)), Pair(*map(wide, gradients))
    dtype = weights.a.dtype
    with in_own_dtype(weights.a.device.type):
        whiten_a = whitening(weights.a, damping).to(dtype)  # (…, r, r)
        whiten_b = whitening(weights.b.mT, damping).to(dtype)
        along_a = whiten_b.mT @ polar(whiten_b @ gradients.a).to(dtype)  # (…, r, n)
        along_b = polar(gradients.b @ whiten_a.mT).to(dtype) @ whiten_a  # (…, m, r)
    return with_split_decay(weights, Pair(along_a * (-step / 2), along_b * (-step / 2)), decay)


def pair_step_size(rule: str, of_a: Matrix, of_b: Matrix, scaling: float) -> float:
    """Return the step size of a pair at learning rate 1: s(m, n)/|c|, s the step-size factor.

    c·BA then moves as far as the base weight, (m, n), would under the same rule, so that one
    learning rate serves adapters and full matrices.

    Args:
        rule: A key of :data:`~hf_muon.optimizer.scaling.STEP_SIZES`.
        of_a: The matrix A, (r, n).
        of_b: The matrix B, (m, r).
        scaling: c. The gradients carry its sign, so the step does not.

    Returns:
        The number that multiplies the learning rate.

    Raises:
        ValueError: c is zero, or the rule depends on fan_out and the layer does not declare it.
    """
    if scaling == 0:
        raise ValueError(
            "An adapter with scaling 0 changes nothing in the model, so no step of its product can "
            "be sized. Give it a lora_alpha other than 0, or use lora_update='factor'."
        )
    return step_size(rule, Matrix.whole((of_b.rows, of_a.cols), of_a.fan_out_dim)) / abs(scaling)


def with_split_decay(weights: Pair, change: Pair, decay: float | Tensor) -> Pair:
    """Return the change dW of A and B with decay of BA: (s − 1)W + dW/s, s = √(1 − decay).

    The product becomes s²·BA + dB·A + B·dA plus terms of second order: the decay applies to it
    once, and does not shorten the step. Where A or B is zero there is nothing to decay.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """
    if not (isinstance(decay, Tensor) or 0 <= decay < 1):
        raise ValueError(
            f"lr·weight_decay is {decay:g} for an adapter's product; at least 0 and less than 1 is "
            "allowed. Lower the weight decay or the learning rate."
        )
    if isinstance(decay, Tensor):  # only the device can read it; the step has checked it
        shrink: Any = (1 - decay).sqrt()
    elif decay == 0:
        return change
    else:
        shrink = math.sqrt(1 - decay)
    nonzero = [(weight != 0).any(-1).any(-1) for weight in weights]
    exists = (nonzero[0] & nonzero[1])[..., None, None]  # (…, 1, 1)
    return Pair(*(
        torch.where(exists, moved / shrink - (1 - shrink) * weight, moved)
        for weight, moved in zip(weights, change, strict=True)
    ))  # fmt: skip


def whitening(rows: Tensor, damping: float) -> Tensor:  # (…, r, l) -> (…, r, r)
    """Return K with KᵀK = (S + δ·(tr S/r)·I)⁻¹ for S = XXᵀ, in float64; zero for X = 0.

    On devices without float64 it is float32, and δ is at least as large as the rounding of S.

    K is the inverse of a Cholesky factor: an orthogonal matrix times the symmetric root S^(−½). It
    gives the same results at a fraction of the cost of an eigendecomposition: polar factors commute
    with orthogonal matrices, so O(MKᵀ)K = O(M·S^(−½))·S^(−½).

    Args:
        rows: X: A, or Bᵀ.
        damping: δ, relative to the mean eigenvalue of S.

    Raises:
        ValueError: δ is too small to make a singular S invertible.
    """
    if not damping >= SMALLEST_DAMPING:
        raise ValueError(
            f"lora_damping is {damping:g}; at least {SMALLEST_DAMPING:g} is needed, because the "
            "Gram matrix of an adapter may be singular."
        )
    dtype = devices.widest(rows.device)  # the condition number of S is that of X squared
    if dtype == torch.float32:
        damping = max(damping, rows.shape[-1] * torch.finfo(dtype).eps)
    factor = rows.to(dtype)
    gram = factor @ factor.mT  # (…, r, r)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]  # (…, 1, 1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    damped = gram + torch.where(mean > 0, damping * mean, 1.0) * identity
    # Skips the check for failure, which waits for the device; the damping rules failure out.
    lower = torch.linalg.cholesky_ex(damped).L
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(gram), upper=False)
    return torch.where(mean > 0, inverse, 0.0)
