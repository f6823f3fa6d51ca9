"""Closed forms for a signal in white noise after a moving average.

In: the strength of a singular direction, the standard deviation of the noise's entries, the shape
and the window T = 1/(1−β). Out: where the direction appears in the spectrum, at which angles, and
where the noise ends. Limits for large matrices: Benaych-Georges and Nadakuditi, J. Multivariate
Anal. 111 (2012), applied to an average that divides white noise by √(2T−1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from hf_muon.diagnostics.noise_edge import cosines_squared


class Seen(NamedTuple):
    """How one direction of the signal appears in the average.

    Attributes:
        sigma: its singular value in the average; the noise edge if it is hidden.
        sin_left: sine of the angle between its left singular vector and that of the average.
        sin_right: the same on the right.
        alignment: cos∠U·cos∠V, the signal alignment of a signal of rank 1.
        visible: whether it exceeds the noise at all.
    """

    sigma: float
    sin_left: float
    sin_right: float
    alignment: float
    visible: bool


def seen(strength: float, deviation: float, shape: tuple[int, int], window: float) -> Seen:
    """Return how a direction of this strength appears in an average over ``window``.

    Args:
        strength: λ, its singular value.
        deviation: σ, of an entry of the noise in one gradient.
        shape: (m, n).
        window: T.
    """
    s = deviation / math.sqrt(2 * window - 1)
    m, n = (side * s**2 for side in shape)
    left, right = cosines_squared(strength, s, shape)
    if left == 0:
        return Seen(noise_edge(deviation, shape, window), 1.0, 1.0, 0.0, False)
    sigma = math.sqrt((strength**2 + m) * (strength**2 + n)) / strength
    sines = (math.sqrt(1 - left), math.sqrt(1 - right))
    return Seen(sigma, *sines, math.sqrt(left * right), True)


def noise_edge(deviation: float, shape: tuple[int, int], window: float) -> float:
    """Return the largest singular value of averaged noise, σ(√m + √n)/√(2T−1)."""
    return deviation * sum(math.sqrt(side) for side in shape) / math.sqrt(2 * window - 1)


def window_of(momentum: float) -> float:
    """Return T = 1/(1−β)."""
    return 1 / (1 - momentum)
