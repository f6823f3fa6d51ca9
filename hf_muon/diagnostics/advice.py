"""Which momentum suits the spectra of a matrix: advice only, nothing acts on it.

In: the leading parts of samples. Out: the smallest window that reveals the signal, how fast the
signal turns, and the momentum in between. Pure functions; letters as in ``metrics``, with
T = 1/(1−β).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hf_muon.diagnostics.noise_edge import cosines_squared
from hf_muon.diagnostics.spectra import Leading
from hf_muon.polar import in_own_dtype

# A suggestion extrapolates from the window it was measured with; at most by this ratio.
_FURTHEST = 4
# Of cos² between two samples. Below it, the signal has turned too far to tell how far.
_LEAST_OVERLAP = 0.1


def is_far_enough(before: Leading, now: Leading, momentum: float) -> bool:
    """Whether two samples are two windows apart, so that they share at most 2 % of their noise."""
    return now.step - before.step >= 2 / (1 - momentum)


def advise(before: Leading | None, now: Leading, momentum: float) -> dict[str, float]:
    """Return the window that suits a matrix.

    ======================  =====================================================================
    ``t_min``               the smallest T that reveals the weakest visible direction
    ``drift``               radians per step by which the visible directions turn
    ``suggested_momentum``  1 − 1/T for the T of :func:`best_window`, but at least ``t_min`` and at
                            most 4 times the window of the measurement
    ======================  =====================================================================

    Args:
        before: An earlier sample that :func:`is_far_enough`, if there is one.
        now: The sample.
        momentum: β of the moving average.

    Returns:
        The values that can be determined: none if no direction is visible, no drift if the signal
        turns too fast for the distance between the samples.
    """
    if now.noise is None or not now.strengths:
        return {}
    found = {"t_min": smallest_window(now.strengths[-1], now.noise.gradient, now.shape)}
    drift = drift_between(before, now) if before else None
    if drift is None:
        return found
    window = 1 / (1 - momentum)
    wanted = max(found["t_min"], best_window(drift, now))
    wanted = min(max(wanted, window / _FURTHEST, 1.0), window * _FURTHEST)
    return {**found, "drift": drift, "suggested_momentum": 1 - 1 / wanted}


def smallest_window(strength: float, deviation: float, shape: tuple[int, int]) -> float:
    """Return T_min = (1 + s²√(mn)/λ²)/2, the window from which a direction λ is visible.

    Args:
        strength: λ.
        deviation: s, the standard deviation of an entry of the noise in a gradient.
        shape: (m, n).

    References:
        arXiv 2606.03899: a spike is visible iff λ⁴(2T−1)² > mn s⁴.
    """
    m, n = shape
    return (1 + deviation**2 * math.sqrt(m * n) / strength**2) / 2


def drift_between(before: Leading, now: Leading) -> float | None:
    """Return the radians per step by which visible directions turn, without the samples' noise.

    A turn by δ and two independent errors of estimation multiply the cosines: the mean cos² over
    the directions is that of the errors (``noise_edge.cosines_squared``) times cos²δ. A turn of
    more than a right angle between samples cannot be told from a smaller one.

    Returns:
        None if nothing is visible, or the overlap is too small to tell.
    """
    r = min(len(before.strengths), len(now.strengths))
    if r == 0:
        return None
    by_noise = (_expected_cosines(before, r) * _expected_cosines(now, r)).mean().item()
    measured = (_overlap(before.left, now.left, r) + _overlap(before.right, now.right, r)) / 2
    overlap = measured / by_noise if by_noise > 0 else 0.0
    if overlap < _LEAST_OVERLAP:
        return None
    return math.acos(math.sqrt(min(1.0, overlap))) / (now.step - before.step)


def _expected_cosines(at: Leading, r: int) -> Tensor:
    """Return the cos² that noise leaves of the first directions, left and right, (r, 2)."""
    deviation = at.noise.filtered if at.noise else math.nan
    return torch.tensor([cosines_squared(one, deviation, at.shape) for one in at.strengths[:r]])


def _overlap(Q: Tensor, U: Tensor, r: int) -> float:
    """Return the mean cos² between two subspaces of r dimensions."""
    with in_own_dtype(Q.device.type):
        return (Q[:, :r].mT @ U[:, :r]).square().sum().item() / r


def best_window(drift: float, now: Leading) -> float:
    """Return the T with the smallest sum of losses to lag and to noise.

    For directions that turn by φ per step, the average over T steps lags by the angle Tφ, on both
    sides; noise adds angles whose squares are (m + n)s²/(2Tλ²). The sum 2(Tφ)² + ν/(2T) is smallest
    at T = (ν/(8φ²))^{1/3}, where ν is the mean of (m + n)s²/λ².

    Args:
        drift: φ in radians per step.
        now: Gives strengths and noise.

    Returns:
        T; infinity without drift.
    """
    if now.noise is None or drift == 0:
        return math.inf
    power = sum(now.shape) * now.noise.gradient**2
    noise = sum(power / one**2 for one in now.strengths) / len(now.strengths)
    return float((noise / (8 * drift**2)) ** (1 / 3))


def typical(name: str, samples: Sequence[dict[str, Any]]) -> float | None:
    """Return the median of a number over the samples that have it; None if none has."""
    values = [sample[name] for sample in samples if name in sample]
    return median(values) if values else None


def in_words(samples: Sequence[dict[str, float]]) -> str:
    """Summarize the advice of some samples, by the median of each number."""
    text = f"{typical('visible_rank', samples) or 0:.0f} directions stand above the noise"
    if (smallest := typical("t_min", samples)) is not None:
        text += f"; they would from a window of {smallest:.3g} steps on"
    if (momentum := typical("suggested_momentum", samples)) is not None:
        drift = typical("drift", samples)
        text += f"; turning by {drift:.2g} radians a step, they ask for momentum={momentum:.4f}"
    return text
