"""What a momentum filter does to a stream of gradients, in closed form.

In: the decays β_k of moving averages m_k ← β_k m_k + (1−β_k)G, the weights w_k of their sum
M = Σ w_k m_k, and whether the output is M or (1−μ)G + μM with μ = Σ w_k β_k (Nesterov). Out: plain
numbers: the impulse response, the share of white noise that remains, the mean age of the inputs.
A single decay with weight 1 is the ordinary moving average.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_muon.optimizer.momentum import past_weight


def impulse_response(
    betas: Sequence[float], weights: Sequence[float], nesterov: bool = False, lags: int = 100
) -> list[float]:
    """The weights h_j in the output of the gradients j steps ago, for j < ``lags``.

    h_j = Σ w_k (1−β_k) β_k^j; with ``nesterov``, μ times that, plus 1−μ at j = 0.

    Args:
        betas: The decays β_k, each in [0, 1).
        weights: Their weights w_k, with sum 1.
        nesterov: Whether the output looks ahead.
        lags: The number of steps.

    Returns:
        h_0, h_1, …: ``lags`` numbers.

    Raises:
        ValueError: Decays or weights that do not form an average.
    """
    _check(betas, weights)
    terms = list(zip(betas, weights, strict=True))
    response = [sum(w * (1 - beta) * beta**lag for beta, w in terms) for lag in range(lags)]
    if not nesterov:
        return response
    mu = past_weight(betas, weights)
    return [mu * h + (1 - mu) * (lag == 0) for lag, h in enumerate(response)]


def noise_factor(betas: Sequence[float], weights: Sequence[float], nesterov: bool = False) -> float:
    """Variance of the output for white noise of variance 1: Σ h_j² over all lags.

    F = Σ_kl w_k w_l (1−β_k)(1−β_l)/(1−β_k β_l), which is 1/(2T−1) for one decay β = 1 − 1/T; with
    ``nesterov``, (1−μ)² + 2(1−μ)μ h_0 + μ²F.

    Args:
        betas: The decays β_k, each in [0, 1).
        weights: Their weights w_k, with sum 1.
        nesterov: Whether the output looks ahead.

    Returns:
        A number in (0, 1] if no weight is negative.

    Raises:
        ValueError: Decays or weights that do not form an average.
    """
    _check(betas, weights)
    terms = list(zip(betas, weights, strict=True))
    factor = sum(
        w * v * (1 - beta) * (1 - gamma) / (1 - beta * gamma)
        for beta, w in terms
        for gamma, v in terms
    )
    if not nesterov:
        return factor
    mu = past_weight(betas, weights)
    first = sum(w * (1 - beta) for beta, w in terms)
    return (1 - mu) ** 2 + 2 * (1 - mu) * mu * first + mu**2 * factor


def mean_age(betas: Sequence[float], weights: Sequence[float], nesterov: bool = False) -> float:
    """Mean number of steps by which the output lags: Σ j·h_j = Σ w_k β_k/(1−β_k).

    With ``nesterov``, μ times that, since the share 1−μ has no age.

    Args:
        betas: The decays β_k, each in [0, 1).
        weights: Their weights w_k, with sum 1.
        nesterov: Whether the output looks ahead.

    Returns:
        Steps; T − 1 for one decay β = 1 − 1/T.

    Raises:
        ValueError: Decays or weights that do not form an average.
    """
    _check(betas, weights)
    age = sum(w * beta / (1 - beta) for beta, w in zip(betas, weights, strict=True))
    return age * past_weight(betas, weights) if nesterov else age


def _check(betas: Sequence[float], weights: Sequence[float]) -> None:
    if not betas or len(betas) != len(weights):
        raise ValueError(
            f"{len(betas)} decays and {len(weights)} weights: give a weight for each decay, and "
            "one decay at least."
        )
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={list(betas)}: each must lie in [0, 1).")
    if abs(sum(weights) - 1) > 1e-6:  # users write weights with few digits
        raise ValueError(f"weights={list(weights)} sum to {sum(weights):g}; 1 is expected.")
