"""What a monitor should say of one matrix, from recorded gradients and weights, in float64.

In: the gradients of all steps and the weights around them, as others wrote them down. Out: the
numbers of one sample by name. Written to be read; shares no code with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import spectra as reference


@dataclass
class History:
    """A matrix in training: ``weights[t]`` after t steps, ``gradients[t]`` of step t + 1."""

    weights: list[Tensor]
    gradients: list[Tensor]
    rates: list[float]  # the learning rate of each step
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    order: str = "pre_polar"

    def average(self, step: int) -> Tensor:
        """M after so many steps."""
        beta, M = self.momentum, torch.zeros_like(self.gradients[0], dtype=torch.float64)
        for G in self.gradients[:step]:
            M = beta * M + (1 - beta) * G.double()
        return M

    def factored(self, step: int) -> Tensor:
        """What the polar factor of a step is taken of."""
        G, M = self.gradients[step - 1].double(), self.average(step)
        if self.order != "pre_polar":
            return G
        return (1 - self.momentum) * G + self.momentum * M if self.nesterov else M

    def direction(self, step: int) -> Tensor:
        """What was applied, as the weights have it: scaled by 0.2·√max(m, n) and the rate."""
        before, after = self.weights[step - 1].double(), self.weights[step].double()
        decayed = (1 - self.rates[step - 1] * self.weight_decay) * before
        return (decayed - after) / (self.rates[step - 1] * 0.2 * math.sqrt(max(before.shape)))


def sample(history: History, step: int, count: int, before: int | None = None) -> dict[str, float]:
    """The numbers of a sample.

    Args:
        history: The matrix.
        step: When.
        count: How many singular values.
        before: The step of the sample before, for the angles between the two.
    """
    G, M, beta = history.gradients[step - 1].double(), history.average(step), history.momentum
    sigma_g, sigma_m = map(reference.singular_values, (G, M))
    edge = noise_edge(G - history.average(step - 1), beta)
    rank = max(1, visible(sigma_m, edge))
    values = {
        "noise_suppression": torch.tensor(sigma_g).quantile(0.5).item()
        / torch.tensor(sigma_m).quantile(0.5).item(),
        "noise_edge": edge,
        "visible_rank": visible(sigma_m, edge),
        "gap": reference.spectral_gap(M, rank),
        "gradient_nuclear_rank": sum(sigma_g) ** 2 / sum(s**2 for s in sigma_g),
        "gradient_stable_rank": reference.stable_rank(G),
        **powers(G, history.average(step - 1), beta),
    }
    for k in range(count):
        values[f"gradient_sigma_{k + 1}"] = sigma_g[k]
        values[f"average_sigma_{k + 1}"] = sigma_m[k]
        values[f"filtering_ratio_{k + 1}"] = sigma_m[k] / sigma_g[k]
    update = history.weights[step].double() - history.weights[step - 1].double()
    for name, X in (("weight", history.weights[step]), ("update", update)):
        values[f"{name}_rms"] = X.double().square().mean().sqrt().item()
        values[f"{name}_stable_rank"] = reference.stable_rank(X)
        values[f"{name}_entropy"] = reference.spectral_entropy(X)
    if history.order != "post_polar":  # there, an average of factors is applied
        P, X = history.direction(step), history.factored(step)
        # float32 gradients say nothing of directions below the rounding of the largest.
        exact = reference.polar(X, rank=visible(reference.singular_values(X), _rounding(X)))
        values["orthogonality_error"] = (torch.norm(P - exact) / torch.norm(exact)).item()
        *_, values["factor_smallest"] = sigma_p = reference.singular_values(P)
        values["factor_largest"] = sigma_p[0]
    if before is not None:
        past = history.average(before)
        edge_then = noise_edge(
            history.gradients[before - 1].double() - history.average(before - 1), beta
        )
        r = min(rank, max(1, visible(reference.singular_values(past), edge_then)))
        values["sin_left"], values["sin_right"] = reference.sin_theta(past, M, r)
    return values


def noise_edge(residual: Tensor, momentum: float) -> float:
    """‖G_t − M_{t−1}‖₂/√(2T), and 2.3 standard deviations of what two such norms scatter."""
    sides = math.sqrt(4 * reference.stable_rank(residual))
    scatter = 1.27 * math.sqrt(2) * (2 * sides * (2 / sides) ** (1 / 3)) / (2 * sides) ** 2
    norm = reference.singular_values(residual)[0] / math.sqrt(2 / (1 - momentum))
    return norm * (1 + 2.3 * scatter / 2)  # σ scatters half as much as σ²


def powers(G: Tensor, before: Tensor, momentum: float) -> dict[str, float]:
    """The energy of the noise in G, from M_{t−1}, and of the signal, with their ratio."""
    T, difference = 1 / (1 - momentum), torch.norm(G - before).item() ** 2
    noise = difference * (1 - 1 / (2 * T))
    signal = torch.norm(before).item() ** 2 - difference / (2 * T)
    found = {"noise_power": noise, "signal_power": signal}
    # Where the two nearly cancel, the ratio is that of roundings.
    clear = signal > 0.05 * difference / (2 * T)
    return found | ({"noise_to_signal": noise / signal} if clear else {})


def _rounding(X: Tensor) -> float:
    return max(X.shape) * torch.finfo(torch.float32).eps * reference.singular_values(X)[0]


def visible(sigma: list[float], edge: float) -> int:
    return sum(s > edge for s in sigma)
