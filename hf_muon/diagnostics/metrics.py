"""Spectral metrics of gradients, filters and updates: pure functions of matrices.

In: matrices (…, m, n), whole and not sharded; leading dimensions broadcast. Out: a number per
matrix, (…), unless stated otherwise. Half precision is computed in float32, other dtypes as they
are; polar factors and singular values are exact. A quantity that is 0/0 is NaN. No gradient is
recorded.

Letters as in arXiv 2606.03899: G a gradient, M the filter's output, X any matrix or update,
S = UΣVᵀ the signal, O(X) the polar factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_muon.polar import in_own_dtype, polar_factor


class PrincipalAngles(NamedTuple):
    """Angles between two pairs of singular subspaces, in radians, ascending.

    Attributes:
        left: Between the column spaces, (…, r).
        right: Between the row spaces, (…, r).
    """

    left: Tensor
    right: Tensor

    @property
    def sin_left(self) -> Tensor:
        """‖sin Θ‖₂ of the column spaces, (…): the sine of their largest angle."""
        return self.left[..., -1].sin()

    @property
    def sin_right(self) -> Tensor:
        """‖sin Θ‖₂ of the row spaces, (…)."""
        return self.right[..., -1].sin()


class OrthogonalityError(NamedTuple):
    """How far an approximate polar factor is from the exact one.

    Attributes:
        relative: ‖P − O(X)‖_F/‖O(X)‖_F, (…).
        smallest: The smallest singular value of P, (…).
        largest: The largest one, (…).
    """

    relative: Tensor
    smallest: Tensor
    largest: Tensor


def signal_alignment(X: Tensor, S: Tensor, rank: int | None = None) -> Tensor:
    """How much of an update moves along the signal: ⟨X, S⟩_F/‖S‖_*.

    The nuclear norm makes O(S) score 1, the maximum for a matrix of spectral norm 1; for a rank-1
    signal λuvᵀ it is uᵀXv. It measures size as well as direction: half an update scores half.

    Args:
        X: Update, (…, m, n). With ``rank``, any matrix whose leading singular vectors are to be
            scored.
        S: Signal, or a proxy of it, (…, m, n).
        rank: If r is given, X is replaced by the truncation U_r V_rᵀ of its polar factor to its r
            largest singular values; the size of X then does not matter.

    Returns:
        Between −‖X‖₂ and ‖X‖₂, (…).

    Raises:
        ValueError: The shapes differ, or ``rank`` is not in 1 … min(m, n).

    References:
        arXiv 2606.03899; for a spike in white noise the rank-1 value is cos∠U·cos∠V.
    """
    X, S = _prepared(X, S)
    if rank is not None:
        X = _truncated_polar(X, _checked_rank(X, rank))
    nuclear: Tensor = torch.linalg.svdvals(S).sum(-1)
    return _inner(X, S) / nuclear


def direction_alignment(X: Tensor, S: Tensor) -> Tensor:
    """The cosine of the angle between update and signal: ⟨X, S⟩_F/(‖X‖_F ‖S‖_F).

    It ignores the size of X, so it compares orders whose updates differ in size. Even the polar
    factor of a low-rank S scores below 1 unless the singular values of S are equal.

    Args:
        X: Update, (…, m, n).
        S: Signal, or a proxy of it, (…, m, n).

    Returns:
        Between −1 and 1, (…).

    Raises:
        ValueError: The shapes differ.
    """
    X, S = _prepared(X, S)
    return _inner(X, S) / (_norm(X) * _norm(S))


def principal_angles(X: Tensor, S: Tensor, rank: int | None = None) -> PrincipalAngles:
    """Angles between the leading singular subspaces of a matrix and those of the signal.

    cos θ_i = σ_i(ÛᵀU) and sin θ_i = σ_{r+1−i}(U − ÛÛᵀU), with Û, U the r leading singular
    vectors of X and S. Both are used, because each is inaccurate at one end of the range.

    Args:
        X: Filter output, (…, m, n).
        S: Signal, (…, m, n).
        rank: r. Default: the numerical rank of S, which must be the same for the whole batch.

    Returns:
        Angles in radians, left and right, each (…, r).

    Raises:
        ValueError: The shapes differ, ``rank`` is not in 1 … min(m, n), or there is no ``rank`` and
            S is zero or its rank varies.

    References:
        Björck and Golub, Math. Comp. 27 (1973); the sin Θ theorem in arXiv 2606.03899.
    """
    X, S = _prepared(X, S)
    U_hat, _, Vh_hat = torch.linalg.svd(X, full_matrices=False)
    U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
    r = _numerical_rank(sigma, max(S.shape[-2:])) if rank is None else _checked_rank(S, rank)
    return PrincipalAngles(
        subspace_angles(U_hat[..., :r], U[..., :r]),
        subspace_angles(Vh_hat[..., :r, :].mT, Vh[..., :r, :].mT),
    )


def spectral_gap(X: Tensor, rank: int) -> Tensor:
    """The distance between signal and noise in the spectrum: σ_r − σ_{r+1}.

    Args:
        X: Filter output, (…, m, n).
        rank: r, the number of singular values that belong to the signal; σ_{min(m, n)+1} is 0.

    Returns:
        At least 0, in the units of X, (…).

    Raises:
        ValueError: ``rank`` is not in 1 … min(m, n).
    """
    (X,) = _prepared(X)
    r = _checked_rank(X, rank)
    sigma: Tensor = torch.linalg.svdvals(X)  # (…, s), descending
    below = sigma[..., r] if r < sigma.shape[-1] else torch.zeros_like(sigma[..., 0])
    return sigma[..., r - 1] - below


def filtering_ratio(M: Tensor, G: Tensor) -> Tensor:
    """What the filter leaves of each singular value: σ_k(M)/σ_k(G), index by index.

    Near 1 for the signal, near 1/R(T) for the noise. Index k of M and of G need not belong to the
    same direction.

    Args:
        M: Filter output, (…, m, n).
        G: The gradient that went in, (…, m, n).

    Returns:
        A ratio per index, (…, min(m, n)); NaN where σ_k(G) is zero up to rounding.

    Raises:
        ValueError: The shapes differ.
    """
    M, G = _prepared(M, G)
    return ratios(torch.linalg.svdvals(M), torch.linalg.svdvals(G), max(G.shape[-2:]))


def noise_suppression(G: Tensor, M: Tensor, S: Tensor | None = None) -> Tensor:
    """How many times smaller the filter makes the noise: R = ‖G − S‖_F/‖M − S‖_F.

    For an EMA of noise that is uncorrelated in time, R = √(2T−1) exactly, in root mean square and
    after many windows T = 1/(1−β). The (2T−1)^{1/4} of arXiv 2606.03899 is a lower bound that holds
    with high probability, also for correlated noise; white noise is suppressed more.

    Args:
        G: Gradient, (…, m, n).
        M: Filter output at the same step, (…, m, n).
        S: Signal, (…, m, n). Default: zero, that is, G and M are pure noise.

    Returns:
        At least 0, (…).

    Raises:
        ValueError: The shapes differ.
    """
    if S is None:
        G, M = _prepared(G, M)
        return _norm(G) / _norm(M)
    G, M, S = _prepared(G, M, S)
    return _norm(G - S) / _norm(M - S)


def stable_rank(X: Tensor) -> Tensor:
    """How many directions carry the energy: ‖X‖_F²/‖X‖₂².

    Args:
        X: Matrix, (…, m, n).

    Returns:
        Between 1 and the rank of X, (…).
    """
    (X,) = _prepared(X)
    weights = energies(torch.linalg.svdvals(X))
    return 1 / weights[..., 0]


def nuclear_rank(X: Tensor) -> Tensor:
    """How many directions benefit from a spectral step: ‖X‖_*²/‖X‖_F².

    Args:
        X: Matrix, (…, m, n).

    Returns:
        Between 1 and the rank of X, which it reaches if all singular values are equal, (…).

    References:
        arXiv 2512.04299: to first order, a spectral step on a layer beats a Euclidean one iff this
        number of its gradient is at least the stable rank of its input activations.
    """
    (X,) = _prepared(X)
    return nuclear_energy(torch.linalg.svdvals(X))


def spectral_entropy(X: Tensor) -> Tensor:
    """How evenly the energy is spread: H = −Σ p_i ln p_i with p_i = σ_i²/Σσ².

    Args:
        X: Matrix, (…, m, n).

    Returns:
        Between 0 for rank 1 and ln min(m, n) for a flat spectrum, in nats, (…).

    References:
        arXiv 2606.08388: among bounded updates along the gradient's singular directions, the polar
        factor has the largest entropy.
    """
    (X,) = _prepared(X)
    entropy: Tensor = torch.special.entr(energies(torch.linalg.svdvals(X))).sum(-1)
    return entropy


def effective_rank(X: Tensor) -> Tensor:
    """The number of equal singular values with the same entropy: exp H.

    Args:
        X: Matrix, (…, m, n).

    Returns:
        Between the stable rank and min(m, n), (…).
    """
    return spectral_entropy(X).exp()


def orthogonality_error(P: Tensor, X: Tensor) -> OrthogonalityError:
    """The error of an approximate polar factor: ‖P − O(X)‖_F/‖O(X)‖_F, and its singular values.

    Args:
        P: The result of an iteration on X, (…, m, n).
        X: Its input, (…, m, n).

    Returns:
        The relative error, and the smallest and largest singular value of P, each (…). For X of
        full rank, an exact polar factor has 0, 1 and 1.

    Raises:
        ValueError: The shapes differ.
    """
    P, X = _prepared(P, X)
    exact = polar_factor(X, method="svd")
    sigma = torch.linalg.svdvals(P)
    return OrthogonalityError(_norm(P - exact) / _norm(exact), sigma[..., -1], sigma[..., 0])


def _prepared(*matrices: Tensor) -> tuple[Tensor, ...]:
    """Convert to one dtype, at least float32; the last two dimensions must agree."""
    for X in matrices:
        if not isinstance(X, Tensor) or not X.is_floating_point():
            kind = X.dtype if isinstance(X, Tensor) else type(X).__name__
            raise TypeError(f"A tensor of real floating-point numbers is needed, not {kind}.")
        if X.ndim < 2 or 0 in X.shape[-2:]:
            raise ValueError(f"A matrix (…, m, n) is needed, not a tensor of {tuple(X.shape)}.")
    shapes = [tuple(X.shape) for X in matrices]
    if len({shape[-2:] for shape in shapes}) > 1:
        raise ValueError(f"Matrices of one shape (…, m, n) are needed, not {shapes}.")
    dtype = torch.float32
    for X in matrices:
        dtype = torch.promote_types(dtype, X.dtype)
    return tuple(X.detach().to(dtype) for X in matrices)


def _checked_rank(X: Tensor, rank: int) -> int:
    most = min(X.shape[-2:])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank!r}: for {tuple(X.shape[-2:])} matrices 1 … {most} is allowed."
        )
    return rank


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    return (X * Y).sum((-2, -1))


def _norm(X: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1))
    return norm


def energies(sigma: Tensor) -> Tensor:
    """Return σ_i²/Σσ² of singular values in decreasing order, (…, s).

    Divides by σ₁ first, so that squares neither overflow nor underflow.
    """
    squares = (sigma / sigma[..., :1]).square()
    return squares / squares.sum(-1, keepdim=True)


def nuclear_energy(sigma: Tensor) -> Tensor:
    """Return (Σσ_i)²/Σσ_i² of singular values in decreasing order, (…)."""
    relative = sigma / sigma[..., :1]
    result: Tensor = relative.sum(-1).square() / relative.square().sum(-1)
    return result


def ratios(over: Tensor, under: Tensor, longer_side: int) -> Tensor:
    """Return the ratios of two spectra, (…, s); NaN where the lower one is zero up to rounding."""
    return torch.where(under > _rounding_threshold(under, longer_side), over / under, torch.nan)


def _rounding_threshold(sigma: Tensor, longer_side: int) -> Tensor:
    """Return the size up to which singular values are rounding errors, as in ``svd_polar``."""
    return longer_side * torch.finfo(sigma.dtype).eps * sigma[..., :1]


def _numerical_rank(sigma: Tensor, longer_side: int) -> int:
    ranks = set((sigma > _rounding_threshold(sigma, longer_side)).sum(-1).flatten().tolist())
    if len(ranks) != 1 or 0 in ranks:
        raise ValueError(f"Signals have numerical ranks {sorted(ranks)}; give one to compare.")
    return int(ranks.pop())


def _truncated_polar(X: Tensor, rank: int) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = sigma.gt(_rounding_threshold(sigma, max(X.shape[-2:]))).to(X.dtype)[..., None, :rank]
    with in_own_dtype(X.device.type):
        factor: Tensor = (U[..., :rank] * kept) @ Vh[..., :rank, :]
    return factor


def subspace_angles(Q: Tensor, U: Tensor) -> Tensor:
    """Return the angles between the spans of two orthonormal bases, ascending, (…, r)."""
    with in_own_dtype(Q.device.type):
        overlap = Q.mT @ U  # (…, r, r)
        outside = U - Q @ overlap  # (…, m, r)
    cosines = torch.linalg.svdvals(overlap)  # descending
    sines = torch.linalg.svdvals(outside).flip(-1)  # ascending
    return torch.atan2(sines, cosines)
