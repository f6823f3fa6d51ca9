"""Spectral metrics by their definitions, and the closed forms for a spike in white noise.

In: one matrix at a time, any dtype; or the parameters of the model. Out: Python floats, computed in
float64. Written to be read, not to be fast; shares no code with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def singular_values(X: Tensor) -> list[float]:
    return torch.linalg.svd(X.double(), full_matrices=False).S.tolist()


def frobenius_product(X: Tensor, Y: Tensor) -> float:
    return sum((X.double() * Y.double()).flatten().tolist())


def polar(X: Tensor, rank: int | None = None) -> Tensor:
    """Σ u_i v_iᵀ over all or the first few singular values."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    rank = len(S) if rank is None else rank
    return sum(torch.outer(U[:, i], Vh[i]) for i in range(rank))


def signal_alignment(X: Tensor, S: Tensor, rank: int | None = None) -> float:
    X = X if rank is None else polar(X, rank)
    return frobenius_product(X, S) / sum(singular_values(S))


def direction_alignment(X: Tensor, S: Tensor) -> float:
    norms = math.sqrt(frobenius_product(X, X) * frobenius_product(S, S))
    return frobenius_product(X, S) / norms


def sin_theta(X: Tensor, S: Tensor, rank: int) -> tuple[float, float]:
    """‖P̂ − P‖₂ for the projectors onto the leading left and right singular subspaces."""

    def projectors(Y):
        U, _, Vh = torch.linalg.svd(Y.double(), full_matrices=False)
        U, V = U[:, :rank], Vh[:rank].T
        return U @ U.T, V @ V.T

    left, right = (a - b for a, b in zip(projectors(X), projectors(S), strict=True))
    return singular_values(left)[0], singular_values(right)[0]


def spectral_gap(X: Tensor, rank: int) -> float:
    sigma = [*singular_values(X), 0.0]
    return sigma[rank - 1] - sigma[rank]


def filtering_ratio(M: Tensor, G: Tensor) -> list[float]:
    return [a / b for a, b in zip(singular_values(M), singular_values(G), strict=True)]


def noise_suppression(G: Tensor, M: Tensor, S: Tensor) -> float:
    noises = (X.double() - S.double() for X in (G, M))
    before, after = (math.sqrt(frobenius_product(noise, noise)) for noise in noises)
    return before / after


def stable_rank(X: Tensor) -> float:
    sigma = singular_values(X)
    return sum(s**2 for s in sigma) / sigma[0] ** 2


def spectral_entropy(X: Tensor) -> float:
    sigma = singular_values(X)
    total = sum(s**2 for s in sigma)
    weights = [s**2 / total for s in sigma]
    return -sum(p * math.log(p) for p in weights if p > 0)


def orthogonality_error(P: Tensor, X: Tensor) -> tuple[float, float, float]:
    exact, sigma = polar(X), singular_values(P)
    difference = P.double() - exact
    relative = frobenius_product(difference, difference) / frobenius_product(exact, exact)
    return math.sqrt(relative), sigma[-1], sigma[0]


class Spike:
    """λuvᵀ in noise of variance 1/m, (m, n), after an EMA of window T: limits for large m, n.

    The EMA divides the noise by √(2T−1), so a spike of strength λ behind it is a spike of strength
    θ = λ√(2T−1) in plain noise, for which the limits are known (Benaych-Georges and Nadakuditi,
    J. Multivariate Anal. 111 (2012), with c = n/m).
    """

    def __init__(self, m: int, n: int, strength: float, window: float) -> None:
        self.gamma = n / m
        self.sigma_T = 1 / math.sqrt(2 * window - 1)
        self.theta = strength / self.sigma_T

    @property
    def is_visible(self) -> bool:
        return self.theta**4 > self.gamma

    @property
    def top(self) -> float:
        """σ₁(M)."""
        t, g = self.theta**2, self.gamma
        return self.sigma_T * math.sqrt((1 + t) * (g + t)) / self.theta

    @property
    def edge(self) -> float:
        """The largest singular value of the noise."""
        return self.sigma_T * (1 + math.sqrt(self.gamma))

    @property
    def sin_left(self) -> float:
        t, g = self.theta**2, self.gamma
        return math.sqrt((g + t) / (t * (1 + t)))

    @property
    def sin_right(self) -> float:
        t, g = self.theta**2, self.gamma
        return math.sqrt(g * (1 + t) / (t * (t + g)))

    @property
    def alignment(self) -> float:
        """cos∠U·cos∠V."""
        return math.sqrt((1 - self.sin_left**2) * (1 - self.sin_right**2))
