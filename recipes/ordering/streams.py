"""Averages of synthetic gradient streams: one pass for several momenta.

In: arguments of ``spiked_stream`` and momenta. Out: the optimizer's moving average for each, and
the last gradient with its signal; and their metrics, as means over independent copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_muon.diagnostics import spiked_stream
from hf_muon.diagnostics.synthetic import Observation

Settings = Mapping[str, Any]


def averages(
    stream: Iterable[Observation],
    momenta: Sequence[float],
    prepare: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> tuple[dict[float, Tensor], Observation]:
    """Return the average of each momentum after the last step, and the last observation.

    Args:
        stream: from ``spiked_stream``.
        momenta: β of each average.
        prepare: a function of the gradient whose result is averaged.
    """
    kept: dict[float, Tensor] = {}
    last = None
    for last in stream:
        prepared = prepare(last.gradient)
        for momentum in momenta:
            average = kept.setdefault(momentum, torch.zeros_like(prepared))
            average.lerp_(prepared, 1 - momentum)
    if last is None:
        raise ValueError("The stream is empty: steps must be 1 or more.")
    return kept, last


def stream_of(settings: Settings) -> Iterable[Observation]:
    """Return the stream that plain settings describe; ``copies`` of it run at once."""
    rest = dict(settings)
    copies = rest.pop("copies")
    return spiked_stream(
        rest.pop("m"), rest.pop("n"), rest.pop("strengths"), batch=(copies,), **rest
    )


def mean_and_error(values: Tensor) -> dict[str, float]:
    """Return mean and standard error over copies, (copies,)."""
    spread = values.std().item() if len(values) > 1 else math.nan
    return {"mean": values.mean().item(), "error": spread / math.sqrt(len(values))}


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of a straight line fitted to log y over log x."""
    logs = [torch.tensor(values, dtype=torch.float64).log() for values in (x, y)]
    return (torch.cov(torch.stack(logs))[0, 1] / logs[0].var()).item()
