"""Probes: what an order and a momentum would make of the gradients of a real model.

In: a model and batches (stationary: K gradients at fixed weights), or a training run that hands
over its gradients (trajectory: a sliding buffer). Out: a :class:`ProbeReport`.

The signal cannot be observed. A proxy is a mean of gradients: of others than the replayed ones
(held out), which is unbiased, or of the same ones (in buffer, as in arXiv 2606.03899), which shares
their noise and finds a signal in noise alone.
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
    """Replay orders and momenta over gradients taken at the weights as they are.

    Each batch gives one gradient, so a batch should be as large as those of training. Half of them
    are replayed, the other half is averaged into the signal's proxy. Weights and gradients of the
    model are left as they were; dropout, and statistics of batch norms, follow its mode.

    K gradients of float32 are kept for every chosen matrix.

    Args:
        model: Any module that has matrices for Muon.
        batches: What ``loss`` takes. A filter has run in after a few windows T = 1/(1−β): 40
            replayed batches for β = 0.95 leave 13 % of the last window empty.
        held_out: Batches for the proxy. Default: the second half of ``batches``.
        loss: ``loss(model, batch)``. Default: ``model(**batch).loss``.
        layers: Regexes of parameter names. Default: all matrices that Muon would train.
        **settings: Fields of :class:`ProbeSettings`: ``orders``, ``momenta``, ``nesterov``,
            ``proxy``, ``rank``, ``flips``, ``before``, ``after``, ``seed``.

    Returns:
        One reading per matrix, order, momentum and proxy.

    Raises:
        ValueError: A setting that is not allowed, fewer than two batches for either half, or a
            pattern that matches nothing.

    Example:
        >>> report = stationary_probe(model, batches, layers="q_proj", momenta=(0.9, 0.95))
        >>> print(report.table())
    """
    asked = ProbeSettings(**settings)
    sources = muon_matrices(model, layers)
    buffers = gradient_buffers(model, batches, loss, sources)
    if held_out is None:
        half = (len(next(iter(buffers.values()))) + 1) // 2
        others = {name: buffer[half:] for name, buffer in buffers.items()}
        buffers = {name: buffer[:half] for name, buffer in buffers.items()}
    else:
        others = gradient_buffers(model, held_out, loss, sources)
    return probe_buffers(asked, buffers, others)


class TrajectoryProbe:
    """Replay orders and momenta over the latest gradients of a training run.

    The buffer slides: the older ``window`` gradients are replayed, and the ``held_out`` ones that
    followed them are averaged into the proxy. A held-out alignment therefore says how well an
    update points along the gradients of the next steps, and drops where the signal turns.

    Memory is (window + held_out) copies of the chosen matrices in float32.

    Args:
        model: Any module that has matrices for Muon.
        window: Gradients to replay, ≥ 2.
        held_out: Gradients after them for the proxy, ≥ 2.
        layers: Regexes of parameter names. Default: all matrices that Muon would train.

    Raises:
        ValueError: A number out of its range, or a pattern that matches nothing.

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
        """Whether enough steps were recorded for a report."""
        return len(self._buffer) == self.window + self.held_out

    def record(self) -> None:
        """Copy the gradients that are there now; the oldest ones are dropped.

        Raises:
            RuntimeError: No matrix has a gradient.
        """
        self._buffer.append(read_gradients(self._sources))

    def report(self, **settings: Any) -> ProbeReport:
        """Read the buffer as it is.

        Args:
            **settings: Fields of :class:`ProbeSettings`.

        Raises:
            RuntimeError: The buffer is not full yet.
            ValueError: A setting that is not allowed.
        """
        asked = ProbeSettings(**settings)
        if not self.is_full:
            raise RuntimeError(
                f"{len(self._buffer)} steps are recorded; a report takes window + held_out = "
                f"{self.window + self.held_out}."
            )
        recorded = {name: torch.stack([g[name] for g in self._buffer]) for name in self._sources}
        return probe_buffers(
            asked,
            {name: steps[: self.window] for name, steps in recorded.items()},
            {name: steps[self.window :] for name, steps in recorded.items()},
        )
