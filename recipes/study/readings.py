"""Readings of a run's gradients that bear on filtering, taken at a few places in the run.

In: the gradients of the matrices, step by step, and further gradients at the same weights. Out: the
noise-to-signal ratio, the share of the change between steps that is not noise, and how well the
updates of three orders align with the next gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_muon import polar_factor

SHARES = (0.1, 0.5, 0.9)
"""Places at which gradients are read, as shares of the run."""
WINDOWS = (5, 20)
"""Numbers of steps that a filter averages here, with equal weights."""
READ, MICRO_BATCHES = 16, 16
"""Number of steps read at each place, and number of gradients at the same weights."""

Gradients = Sequence[Tensor]
"""One gradient, or one stack of gradients, for each matrix."""


class Watch:
    """Reads ``READ`` steps from each place on.

    Attributes:
        noise_to_signal: the ratio by place; None where no signal is left.
        found: the readings of :func:`of_steps` by place.
    """

    def __init__(self, steps: int) -> None:
        self.noise_to_signal: dict[str, float | None] = {}
        self.found: dict[str, dict[str, float]] = {}
        self._places = {max(1, round(share * steps)): str(share) for share in SHARES}
        self._kept: list[list[Tensor]] = []
        self._noise = 0.0

    def see(self, step: int, gradients: Gradients, again: Callable[[], Gradients]) -> None:
        """Take the gradients of a step; ``again`` returns others at the same weights."""
        self._kept = [*self._kept[-(max(WINDOWS) + READ) :], [g.clone() for g in gradients]]
        if step in self._places:
            self._noise, signal = noise_and_signal(stacks([again() for _ in range(MICRO_BATCHES)]))
            reading = round(self._noise / signal, 2) if signal > 0 else None
            self.noise_to_signal[self._places[step]] = reading
        if step - READ in self._places:
            self.found[self._places[step - READ]] = of_steps(stacks(self._kept), self._noise)


def stacks(gradients: Sequence[Gradients]) -> list[Tensor]:
    """Return all gradients of each matrix, (k, m, n)."""
    return [torch.stack(of_matrix) for of_matrix in zip(*gradients, strict=True)]


def noise_and_signal(gradients: Gradients) -> tuple[float, float]:
    """Return unbiased estimates of tr Σ and ‖G‖² from gradients (k, m, n) at the same weights.

    The expectation of ‖Σg‖² − Σ‖g‖² is k(k−1)‖G‖².
    """
    count = len(gradients[0])
    squares = float(dot(gradients, gradients).sum())
    total = [of_matrix.sum(0, keepdim=True) for of_matrix in gradients]
    signal = (float(dot(total, total)) - squares) / (count * (count - 1))
    return squares / count - signal, signal


def of_steps(gradients: Gradients, noise: float) -> dict[str, float]:
    """Return mean readings over the last ``READ`` of the gradients of successive steps, (k, m, n).

    * ``oscillation``, 1 − tr Σ/(½‖Gₜ − Gₜ₋₁‖²): the share of the change between two gradients that
      comes from the moved weights and not from the noise of the batches.
    * ``last``, ⟨O(Gₜ₋₁), Gₜ⟩/‖Gₜ‖_*: the descent on the next gradient of a step along the polar
      factor of the last one, as a share of the largest possible descent.
    * ``pre_T``: the same for a step along the polar factor of the mean of the last T gradients.
    * ``post_T``: the same for a step along the mean of their polar factors, not rescaled.
    """
    count = min(READ, len(gradients[0]) - 1)
    read = [of_matrix[-count:] for of_matrix in gradients]
    before = [of_matrix[-count - 1 : -1] for of_matrix in gradients]
    changes = [b - a for a, b in zip(before, read, strict=True)]
    change = float(dot(changes, changes).mean()) / 2
    polar = [factor(of_matrix) for of_matrix in gradients]
    most = dot(read, [of_matrix[-count:] for of_matrix in polar])  # ‖Gₜ‖_*, (count,)
    updates = {"last": [of_matrix[-count - 1 : -1] for of_matrix in polar]}
    for T in WINDOWS:
        updates[f"pre_{T}"] = [factor(means(of_matrix, T, count)) for of_matrix in gradients]
        updates[f"post_{T}"] = [means(of_matrix, T, count) for of_matrix in polar]
    found = {name: float((dot(update, read) / most).mean()) for name, update in updates.items()}
    found["oscillation"] = 1 - noise / change if change else 0.0
    return {name: round(value, 4) for name, value in found.items()}


def means(x: Tensor, window: int, count: int) -> Tensor:
    """Return means over ``window`` entries, before each of the last ``count``, (count, m, n)."""
    ends = range(len(x) - count, len(x))
    return torch.stack([x[max(0, end - window) : end].mean(0) for end in ends])


def factor(x: Tensor) -> Tensor:
    """Return the polar factor of each matrix."""
    return polar_factor(x, dtype="float32")


def dot(some: Gradients, others: Gradients) -> Tensor:
    """Return the scalar product over all matrices, (k,)."""
    return sum((a * b).sum((-2, -1)) for a, b in zip(some, others, strict=True))
