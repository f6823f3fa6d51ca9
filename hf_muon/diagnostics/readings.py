"""From gradient buffers to calibrated statistics.

In: gradients to replay and held-out gradients, matrix by matrix. Out: readings, one per matrix,
order, momentum and proxy, each statistic beside its null.

The null comes from copies of the buffers whose gradients have balanced random signs. A signal
cancels in their mean, while symmetric noise stays the same. The value of a statistic on these
copies is its value without a signal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_muon.config import MuonConfig, Order
from hf_muon.diagnostics import metrics
from hf_muon.diagnostics.probe_report import ProbeReport, Reading, Statistic
from hf_muon.diagnostics.replay import Filter, Stages, stages, through
from hf_muon.optimizer.momentum import single
from hf_muon.polar import in_own_dtype
from hf_muon.stages import Momentum
from hf_muon.values import require_one_of

Proxy = Literal["held_out", "in_buffer", "both"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What a probe computes from the gradients of each matrix.

    Attributes:
        orders: Orders to replay.
        momenta: Values of β in [0, 1) to try; each may be several averages. Default: 0.95.
        nesterov: Whether the momentum looks ahead, as the optimizer's does by default.
        settings: Further fields of :class:`~hf_muon.MuonConfig`: ``momentum_weights``,
            ``prefilter``, ``matrix_map``, ``rescale``, …
        proxy: The mean that stands for the signal: ``held_out``, ``in_buffer`` or ``both``.
        rank: r, the number of leading singular directions that count as signal.
        flips: Number of sign-flipped copies of the buffers that calibrate the null, ≥ 2.
        before: An additional filter of the gradients, as in :func:`~hf_muon.diagnostics.replay`.
        after: An additional filter of the updates.
        seed: Of the random signs.
    """

    orders: Sequence[str] = ORDERS
    momenta: Sequence[Momentum] = (0.95,)
    nesterov: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    proxy: Proxy = "held_out"
    rank: int = 1
    flips: int = 16
    before: Filter | None = None
    after: Filter | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what the metrics do not check; ``MuonConfig`` checks orders and momenta."""
        require_one_of("proxy", self.proxy, get_args(Proxy))
        if self.flips < 2:
            raise ValueError(f"flips={self.flips!r}: the spread of the null takes 2 or more.")
        if not self.orders or not self.momenta:
            raise ValueError(
                f"orders={self.orders!r}, momenta={self.momenta!r}: one of each is needed."
            )
        if self.rank < 1:
            raise ValueError(f"rank={self.rank!r}: 1 or more is expected.")
        _ = self.configs

    @cached_property
    def configs(self) -> list[MuonConfig]:
        """One for each order and momentum; an order without a filter appears once."""
        chosen = []
        for order, momentum in product(self.orders, self.momenta):
            config = MuonConfig(
                order=order,  # type: ignore[arg-type]  # checked by the constructor
                momentum=momentum,
                nesterov=self.nesterov,
                **{"polar_method": "svd", **self.settings},
            )
            if momentum == self.momenta[0] or _filters(config):
                chosen.append(config)
        return chosen


def _filters(config: MuonConfig) -> bool:
    return bool(config.rule.buffers)


def probe_buffers(
    settings: ProbeSettings, buffers: Mapping[str, tuple[Tensor, Tensor]]
) -> ProbeReport:
    """Compute readings of gradient buffers, whatever their source.

    Args:
        settings: What to replay.
        buffers: By name, the gradients to replay, (K, m, n), oldest first, and the held-out ones,
            (H, m, n).

    Raises:
        ValueError: A buffer has fewer than two gradients.
    """
    readings: list[Reading] = []
    for name, (buffer, others) in buffers.items():
        if min(len(buffer), len(others)) < 2:
            raise ValueError(
                f"{len(buffer)} gradients to replay and {len(others)} held out: two or more of "
                "either are needed. Give more batches."
            )
        readings += _readings(settings, name, buffer, others)
    return ProbeReport(tuple(readings))


def _readings(settings: ProbeSettings, name: str, buffer: Tensor, others: Tensor) -> list[Reading]:
    """Return all readings of one matrix."""
    generator = torch.Generator().manual_seed(settings.seed)
    signs, other_signs = (
        balanced_signs(len(steps), settings.flips, generator).to(buffer)
        for steps in (buffer, others)
    )
    flipped = Flipped(buffer, signs)
    proxies = {"held_out": Flipped(others, other_signs).mean(), "in_buffer": flipped.mean()}
    if settings.proxy != "both":
        proxies = {settings.proxy: proxies[settings.proxy]}
    readings = []
    for config in settings.configs:
        chosen = stages(config, dtype=buffer.dtype, before=settings.before, after=settings.after)
        passed, update = flipped.last_step(chosen)
        for proxy, signal in proxies.items():
            statistics = _statistics(passed, update, signal, settings.rank)
            readings.append(
                Reading(
                    layer=name,
                    shape=(buffer.shape[-2], buffer.shape[-1]),
                    order=config.order,
                    momentum=single(vars(config), 0) if _filters(config) else 0.0,
                    proxy=proxy,
                    statistics={key: _calibrated(value) for key, value in statistics.items()},
                )
            )
    return readings


def _statistics(passed: Tensor, update: Tensor, signal: Tensor, rank: int) -> dict[str, Tensor]:
    """Return metrics of the filter's output and of the update, each (1 + flips,)."""
    angles = metrics.principal_angles(passed, signal, rank)
    return {
        "alignment": metrics.signal_alignment(update, signal),
        "direction": metrics.direction_alignment(update, signal),
        "sin_left": angles.sin_left,
        "sin_right": angles.sin_right,
        "gap": metrics.spectral_gap(passed, rank),
        "effective_rank": metrics.effective_rank(passed),
    }


def _calibrated(values: Tensor) -> Statistic:
    """Combine values: the first is the reading, the others are the null."""
    null = values[1:]
    return Statistic(values[0].item(), null.mean().item(), null.std().item())


def balanced_signs(steps: int, flips: int, generator: torch.Generator) -> Tensor:
    """Return rows of ±1, half of each sign (±1 for odd lengths); the first row is all ones.

    A balanced row cancels a constant signal in the mean and leaves symmetric noise as it is.

    Returns:
        (1 + flips, steps).
    """
    rows = [torch.ones(steps)]
    for _ in range(flips):
        alternating = torch.ones(steps)
        alternating[::2] = -1
        first = 1 - 2 * torch.randint(2, (), generator=generator)
        rows.append(first * alternating[torch.randperm(steps, generator=generator)])
    return torch.stack(rows)


class Flipped:
    """A gradient buffer and its sign-flipped copies, replayed together, one step at a time.

    Args:
        gradients: (K, m, n).
        signs: (1 + flips, K).
    """

    def __init__(self, gradients: Tensor, signs: Tensor) -> None:
        self.gradients = gradients
        self.signs = signs
        self._factors: Tensor | None = None

    def mean(self) -> Tensor:
        """Mean gradient of every copy, (1 + flips, m, n)."""
        with in_own_dtype(self.gradients.device.type):
            return torch.einsum("fk,kmn->fmn", self.signs, self.gradients) / len(self.gradients)

    def _steps(self, tensors: Iterable[Tensor]) -> Iterable[Tensor]:
        return (
            sign[:, None, None] * tensor for sign, tensor in zip(self.signs.T, tensors, strict=True)
        )

    def last_step(self, chosen: Stages) -> tuple[Tensor, Tensor]:
        """Return the output of the filters before (or else after) the polar factor; and the update.

        Computes only the polar factors that are needed: the last one if nothing follows it; and
        those of the raw gradients once for all copies and settings, because O(−G) = −O(G).
        """
        if chosen.before and not chosen.after:
            passed = _last(through(self._steps(self.gradients), chosen.before))
            return passed, chosen.polar(passed)
        if chosen.before:
            inputs = deque(through(self._steps(self.gradients), chosen.before))
            return inputs[-1], _last(through(map(chosen.polar, inputs), chosen.after))
        if self._factors is None:
            self._factors = chosen.polar(self.gradients)
        update = _last(through(self._steps(self._factors), chosen.after))
        passed = update if chosen.after else self.signs[:, -1, None, None] * self.gradients[-1]
        return passed, update


def _last(stream: Iterable[Tensor]) -> Tensor:
    return deque(stream, maxlen=1)[0]
