"""Where the noise in a filter's output ends, and which part of the signal exceeds it.

In: a gradient and its moving average, whole matrices (m, n). Out: the edge above which a singular
value of the average is no longer noise, and the effect of such noise on a signal. Pure functions;
letters as in ``metrics``, with T = 1/(1−β) and λ a singular value of the signal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_muon.diagnostics.metrics import energies

# 2.3 standard deviations 1.27·√2 of a difference, halved because σ is the root of σ².
_MARGIN = 2.3 * 1.27 * math.sqrt(2) / 2


class Noise(NamedTuple):
    """White noise with the same edge as the actual noise.

    Attributes:
        edge: The largest singular value of the noise in M.
        filtered: Standard deviation of its entries.
        gradient: Standard deviation of the entries of the noise in G.
    """

    edge: float
    filtered: float
    gradient: float


def noise_in(G: Tensor, M: Tensor, momentum: float) -> Noise | None:
    """Estimate the noise from the difference between a gradient and the average before it.

    A fixed signal cancels in G_t − M_{t−1} = (G_t − M_t)/β. The remainder is noise with 2T/(2T−1)
    times the variance of the noise in G, and the noise in M has 1/(2T−1) of that variance. With the
    same covariance of rows and columns, ‖noise in M‖₂ ≈ ‖G_t − M_t‖₂/(β√(2T)). By Weyl's inequality
    no singular value of M above it is noise alone. Nothing is assumed about the covariance. That
    matters, because the noise of real gradients is far from white: an edge from the median singular
    value and the Marchenko-Pastur law (Gavish and Donoho, arXiv 1305.5870) would be several times
    too low.

    Both norms vary: σ₁² of n × n white noise by 1.27·2s²√n(2/√n)^{1/3}, where 1.27 is the standard
    deviation of the Tracy-Widom law (Johnstone, Ann. Statist. 29 (2001)). The edge is raised by 2.3
    standard deviations of their difference, which leaves 1 % of false alarms, and more if the noise
    is in few rows and columns. For noise that is not white, n is four times its stable rank, as it
    is for white noise. White noise has the edge s(√m + √n), which gives s.

    Args:
        G: Gradient, (m, n).
        M: Moving average after this gradient, M_t = βM_{t−1} + (1−β)G_t, (m, n). It is accurate
            after a few windows; before that, the edge is too high.
        momentum: β.

    Returns:
        The noise; None if there is no averaging (β = 0), or G and M are equal.
    """
    if momentum == 0:
        return None
    window = 1 / (1 - momentum)
    sigma = torch.linalg.svdvals(G - M) / (momentum * math.sqrt(2 * window))
    norm = sigma[0].item()
    if not norm > 0:
        return None
    stable_rank = 1 / energies(sigma)[0].item()
    margin = _MARGIN / (4 * stable_rank ** (2 / 3))
    filtered = norm / sum(math.sqrt(side) for side in G.shape)
    return Noise(norm * (1 + margin), filtered, filtered * math.sqrt(2 * window - 1))


class Powers(NamedTuple):
    """Energy of noise and signal in a gradient G = S + Ξ.

    Attributes:
        noise: tr Σ = E‖Ξ‖_F², an unbiased estimate.
        signal: ‖S‖_F², an unbiased estimate; noise may make it negative.
    """

    noise: float
    signal: float

    @property
    def noise_to_signal(self) -> float:
        """The ratio tr Σ/‖S‖_F²; NaN if no signal remains."""
        return self.noise / self.signal if self.signal > 0 else math.nan


def powers_in(G: Tensor, M: Tensor, momentum: float) -> Powers | None:
    """Estimate tr Σ and ‖S‖_F² from the difference between a gradient and the average before it.

    For a fixed S, noise that is uncorrelated in time, and an average over many steps, G_t and
    M_{t−1} are independent, both with mean S, and with noise of tr Σ and tr Σ/(2T−1). So
    E‖G_t − M_{t−1}‖_F² = tr Σ·2T/(2T−1) and E‖M_{t−1}‖_F² = ‖S‖_F² + tr Σ/(2T−1), and without bias

        tr Σ ≈ (2T−1)/(2T)·‖G_t − M_{t−1}‖_F²,   ‖S‖_F² ≈ ‖M_{t−1}‖_F² − ‖G_t − M_{t−1}‖_F²/(2T).

    The ratio of the two varies a lot; over several samples, divide their sums. A signal that turns
    within a window counts as noise. Nothing is assumed about the covariance of the entries.

    Args:
        G: Gradient, (m, n).
        M: Moving average after this gradient, M_t = βM_{t−1} + (1−β)G_t, (m, n).
        momentum: β.

    Returns:
        Both energies; None if there is no averaging (β = 0).
    """
    if momentum == 0:
        return None
    window = 1 / (1 - momentum)
    before = (M - (1 - momentum) * G) / momentum
    difference = (G - before).square().sum().item()
    noise = difference * (2 * window - 1) / (2 * window)
    return Powers(noise, before.square().sum().item() - difference / (2 * window))


def signal_strength(y: float, deviation: float, shape: Sequence[int]) -> float:
    """Return the λ that noise has raised to y; 0 if noise alone may reach y.

    From y² = (λ² + m s²)(λ² + n s²)/λ².

    Args:
        y: Singular value of signal and noise together.
        deviation: s, the standard deviation of a noise entry.
        shape: (m, n).

    References:
        Benaych-Georges and Nadakuditi, J. Multivariate Anal. 111 (2012).
    """
    m, n = (side * deviation**2 for side in shape)
    excess = y**2 - m - n
    if excess <= 2 * math.sqrt(m * n):
        return 0.0
    return math.sqrt((excess + math.sqrt(excess**2 - 4 * m * n)) / 2)


def cosines_squared(strength: float, deviation: float, shape: Sequence[int]) -> tuple[float, float]:
    """Return cos² between singular vectors of the signal and of signal plus noise, left and right.

    With t = λ²: cos²∠U = (t² − mn s⁴)/(t(t + m s²)), on the right with n for m; 0 if that is
    negative, because the signal is then invisible.

    Args:
        strength: λ.
        deviation: s, the standard deviation of a noise entry.
        shape: (m, n).

    References:
        As :func:`signal_strength`; with s² = 1/m these are the formulas of arXiv 2606.03899.
    """
    m, n = (side * deviation**2 for side in shape)
    t = strength**2
    above = t**2 - m * n
    return (above / (t * (t + m)), above / (t * (t + n))) if above > 0 else (0.0, 0.0)
