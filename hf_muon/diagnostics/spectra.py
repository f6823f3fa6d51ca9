"""The numbers of one matrix in one step.

In: the whole matrices (m, n) of a step: gradient, moving average, weight, update, polar factor.
Out: numbers by name, and the leading singular subspaces for comparison with a later step. Pure
functions; letters as in ``metrics``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_muon.diagnostics.metrics import (
    energies,
    nuclear_energy,
    orthogonality_error,
    ratios,
    subspace_angles,
)
from hf_muon.diagnostics.noise_edge import Noise, noise_in, powers_in, signal_strength

# How many directions are kept for the next sample; more are rarely visible.
_MOST_DIRECTIONS = 16


@dataclass(frozen=True)
class StepMatrices:
    """One matrix in one step, (m, n) in float32 or better.

    Attributes:
        gradient: G, as the optimizer received it: clipped, averaged over ranks.
        average: M_t = βM_{t−1} + (1−β)G_t.
        weight: W after the step.
        update: What the step added to W, weight decay included.
        factored: X, the input of the polar factor: M, G, or Nesterov's (1−β)G + βM.
        factor: P, the polar factor that was applied; None if another map was applied.
    """

    gradient: Tensor
    average: Tensor
    weight: Tensor
    update: Tensor
    factored: Tensor
    factor: Tensor | None


@dataclass(frozen=True)
class Leading:
    """The visible part of M; the first direction if nothing is visible.

    Attributes:
        step: The step of the sample.
        left: Leading left singular vectors, (m, r).
        right: Leading right singular vectors, (n, r).
        noise: In M and in G; None if it cannot be measured.
        strengths: λ of the signal behind each visible direction, in decreasing order.
    """

    step: int
    left: Tensor
    right: Tensor
    noise: Noise | None
    strengths: list[float] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.left), len(self.right)


def measure(
    step: int, at: StepMatrices, momentum: float, count: int
) -> tuple[dict[str, float], Leading]:
    """Return the numbers of one sample.

    ========================================  ===================================================
    ``gradient_sigma_k``, ``average_sigma_k``  σ_k(G), σ_k(M)
    ``filtering_ratio_k``                      σ_k(M)/σ_k(G)
    ``gradient_nuclear_rank``                  ‖G‖_*²/‖G‖_F²
    ``gradient_stable_rank``                   ‖G‖_F²/‖G‖₂²
    ``noise_power``, ``signal_power``          tr Σ and ‖S‖_F² of G (``noise_edge.powers_in``), and
    and ``noise_to_signal``                    their ratio where both are above zero
    ``noise_suppression``                      R(T), as median σ(G) over median σ(M)
    ``noise_edge``, ``visible_rank``           the largest singular value of the noise in M
                                               (``noise_edge.noise_in``), and how many are above it
    ``gap``                                    σ_r − σ_{r+1} of M, r the visible rank, at least 1
    ``weight_…``, ``update_…``                 ``rms``, ``stable_rank``, ``entropy``
    ``orthogonality_error``                    ‖P − O(X)‖_F/‖O(X)‖_F
    ``factor_smallest``, ``factor_largest``    singular values of P
    ========================================  ===================================================

    Args:
        step: Number of the step.
        at: Its matrices.
        momentum: β of the moving average.
        count: How many σ_k to return, k = 1 … count.

    Returns:
        The values that are defined (none is NaN or infinite, except for weights), and the leading
        part.
    """
    sigma_g = torch.linalg.svdvals(at.gradient)
    U, sigma_m, Vh = torch.linalg.svd(at.average, full_matrices=False)
    noise = noise_in(at.gradient, at.average, momentum)
    visible = int((sigma_m > noise.edge).sum()) if noise else 0
    rank = max(1, visible)
    values = {
        **_numbered("gradient_sigma", sigma_g, count),
        **_numbered("average_sigma", sigma_m, count),
        **_numbered("filtering_ratio", ratios(sigma_m, sigma_g, max(at.gradient.shape)), count),
        "gradient_nuclear_rank": nuclear_energy(sigma_g).item(),
        "gradient_stable_rank": (1 / energies(sigma_g)[0]).item(),
        "noise_suppression": (sigma_g.quantile(0.5) / sigma_m.quantile(0.5)).item(),
        "noise_edge": noise.edge if noise else math.nan,
        "visible_rank": float(visible) if noise else math.nan,
        "gap": (sigma_m[rank - 1] - sigma_m[rank : rank + 1].sum()).item(),
        **_powers(at, momentum),
        **_shape_of("update", at.update),
    }
    if at.factor is not None:
        error = orthogonality_error(at.factor, at.factored)
        values["orthogonality_error"] = error.relative.item()
        values["factor_smallest"] = error.smallest.item()
        values["factor_largest"] = error.largest.item()
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    kept = min(rank, _MOST_DIRECTIONS)
    strengths = [
        signal_strength(y, noise.filtered, at.gradient.shape) if noise else math.nan
        for y in sigma_m[: min(visible, kept)].tolist()
    ]
    leading = Leading(step, U[:, :kept], Vh[:kept].mT, noise, strengths)
    return {**values, **_shape_of("weight", at.weight)}, leading


def turned(before: Leading, now: Leading) -> dict[str, float]:
    """Return ‖sin Θ‖₂ between the leading subspaces of two samples, of their common dimension."""
    r = min(before.left.shape[1], now.left.shape[1])
    return {
        "sin_left": subspace_angles(before.left[:, :r], now.left[:, :r])[-1].sin().item(),
        "sin_right": subspace_angles(before.right[:, :r], now.right[:, :r])[-1].sin().item(),
    }


def _powers(at: StepMatrices, momentum: float) -> dict[str, float]:
    powers = powers_in(at.gradient, at.average, momentum)
    if powers is None:
        return {}
    return {
        "noise_power": powers.noise,
        "signal_power": powers.signal,
        "noise_to_signal": powers.noise_to_signal,
    }


def _numbered(name: str, values: Tensor, count: int) -> dict[str, float]:
    return {f"{name}_{k}": value for k, value in enumerate(values[:count].tolist(), start=1)}


def _shape_of(name: str, X: Tensor) -> dict[str, float]:
    """Return size and flatness of a matrix; for a weight that is not finite only its size."""
    rms = X.square().mean().sqrt().item()
    found = {f"{name}_rms": rms}
    if math.isfinite(rms) and rms > 0:
        shares = energies(torch.linalg.svdvals(X))
        found[f"{name}_stable_rank"] = 1 / shares[0].item()
        found[f"{name}_entropy"] = torch.special.entr(shares).sum().item()
    return found
