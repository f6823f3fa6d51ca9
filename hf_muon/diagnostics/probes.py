"""Probes: what an order and a momentum would do with the gradients of a real model.

In: a model and batches (stationary: K gradients at fixed weights), or the gradients of a training
run (trajectory: a sliding buffer). Out: a :class:`ProbeReport`.

The signal cannot be observed; a mean of gradients is its proxy. A mean of gradients that are not
replayed (held out) is unbiased. A mean of the replayed ones (in buffer, as in arXiv 2606.03899)
shares their noise, and finds a signal even in pure noise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_muon.diagnostics.gradients import (
    Loss,
    gradient_buffers,
    model_loss,
    muon_matrices,
    read_gradients,
)
from hf_muon.diagnostics.probe_report import ProbeReport
from hf_muon.diagnostics.readings import ProbeSettings, probe_buffers


def stationary_probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    loss: Loss = model_loss,
    layers: str | Sequence[str] | None = None,
    **settings: Any,
) -> ProbeReport:
    """Replay orders and momenta over gradients taken at the current weights.

    Each batch gives one gradient, so it should be as large as in training. Half of the gradients
    are replayed; the other half is averaged into the proxy of the signal. The model's weights and
    gradients are restored; dropout, and statistics of batch norms, follow its mode.

    Keeps K float32 gradients of every chosen matrix.

    Args:
        model: Any module that has matrices for Muon.
        batches: Arguments for ``loss``. A filter takes a few windows T = 1/(1−β) to fill: after 40
            replayed batches with β = 0.95, 13 % of the weight is still on the initial zeros.
        held_out: Batches for the proxy. Default: the second half of ``batches``.
        loss: ``loss(model, batch)``. Default: ``model(**batch).loss``.
        layers: Regexes of parameter names. Default: all matrices that Muon would train.
        **settings: Fields of :class:`ProbeSettings`: ``orders``, ``momenta``, ``nesterov``,
            ``proxy``, ``rank``, ``flips``, ``before``, ``after``, ``seed``.

    Returns:
        One reading per matrix, order, momentum and proxy.

    Raises:
        ValueError: A setting is not allowed, either half has fewer than two batches, or a pattern
            matches nothing.

    Example:
        >>> report = stationary_probe(model, batches, layers="q_proj", momenta=(0.9, 0.95))
        >>> print(report.table())
    """
    asked = ProbeSettings(**settings)
    sources = muon_matrices(model, layers)
    buffers = gradient_buffers(model, batches, loss, sources)
    if held_out is None:
        half = (len(next(iter(buffers.values()))) + 1) // 2
        return probe_buffers(asked, {name: (b[:half], b[half:]) for name, b in buffers.items()})
    others = gradient_buffers(model, held_out, loss, sources)
    return probe_buffers(asked, {name: (b, others[name]) for name, b in buffers.items()})


class TrajectoryProbe:
    """Replay orders and momenta over the latest gradients of a training run.

    The buffer slides: the older ``window`` gradients are replayed, and the ``held_out`` gradients
    that followed them are averaged into the proxy. A held-out alignment thus tells how well an
    update points along the gradients of the next steps, and drops if the signal turns.

    Memory: (window + held_out) copies of the chosen matrices in float32.

    Args:
        model: Any module that has matrices for Muon.
        window: Number of gradients to replay, ≥ 2.
        held_out: Number of later gradients for the proxy, ≥ 2.
        layers: Regexes of parameter names. Default: all matrices that Muon would train.

    Raises:
        ValueError: A number is out of range, or a pattern matches nothing.

    Example:
        >>> probe = TrajectoryProbe(model, layers="mlp")
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     probe.record()  # before zero_grad; under a gradient scaler, after unscaling
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> print(probe.report(momenta=(0.9, 0.95)).table())
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int = 32,
        held_out: int = 16,
        layers: str | Sequence[str] | None = None,
    ) -> None:
        for name, value in (("window", window), ("held_out", held_out)):
            if value < 2:
                raise ValueError(f"{name}={value!r}: 2 gradients or more are needed.")
        self.window = window
        self.held_out = held_out
        self._sources = muon_matrices(model, layers)
        self._buffer: deque[dict[str, Tensor]] = deque(maxlen=window + held_out)

    @property
    def is_full(self) -> bool:
        """Whether enough steps have been recorded for a report."""
        return len(self._buffer) == self.window + self.held_out

    def record(self) -> None:
        """Copy the current gradients; the oldest ones are dropped.

        Raises:
            RuntimeError: No matrix has a gradient.
        """
        self._buffer.append(read_gradients(self._sources))

    def report(self, **settings: Any) -> ProbeReport:
        """Compute the readings of the current buffer.

        Args:
            **settings: Fields of :class:`ProbeSettings`.

        Raises:
            RuntimeError: The buffer is not full yet.
            ValueError: A setting is not allowed.
        """
        asked = ProbeSettings(**settings)
        if not self.is_full:
            raise RuntimeError(
                f"{len(self._buffer)} steps are recorded; a report takes window + held_out = "
                f"{self.window + self.held_out}."
            )
        steps = {name: torch.stack([g[name] for g in self._buffer]) for name in self._sources}
        return probe_buffers(
            asked, {name: (b[: self.window], b[self.window :]) for name, b in steps.items()}
        )
