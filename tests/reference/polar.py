"""The polar factor by its definition in float64, and matrices with a known spectrum.

In: a shape and a kind of spectrum, or any matrix. Out: float64 matrices, polar factors and errors.
Written to be read, not to be fast; shares no code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def polar_factor(X: Tensor) -> Tensor:
    """O(X) = Σ_i u_i v_iᵀ over the singular values above 1e-12 of the largest."""
    if X.ndim > 2:
        return torch.stack([polar_factor(x) for x in X])
    factor = torch.zeros(X.shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    for i, sigma in enumerate(S):
        if sigma > 1e-12 * S[0]:
            factor += torch.outer(U[:, i], Vh[i])
    return factor


def matrix(m: int, n: int, spectrum: str = "gaussian", *, seed: int = 0) -> Tensor:
    """A float64 matrix: standard normal entries, or their singular vectors with σ_k = 1/k."""
    gaussian = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if spectrum == "gaussian":
        return gaussian
    U, S, Vh = torch.linalg.svd(gaussian, full_matrices=False)
    return U * (1 / torch.arange(1, len(S) + 1)) @ Vh


def low_rank(m: int, n: int, rank: int, *, seed: int = 0) -> Tensor:
    """A float64 matrix of the given rank."""
    return matrix(m, rank, seed=seed) @ matrix(rank, n, seed=seed + 1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖_F / ‖expected‖_F in float64."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
