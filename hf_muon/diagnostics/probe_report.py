"""The result of a probe.

In: readings, one per matrix, order, momentum and proxy. Out: text, or plain values for JSON. Every
statistic is shown beside its null, and a reading that the null explains is marked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich.table import Table

from hf_muon.routing.table import text


class Statistic(NamedTuple):
    """A number, and the value that it has without a signal.

    Attributes:
        value: From the gradients as they are.
        null: Mean over sign-flipped buffers.
        spread: Standard deviation over sign-flipped buffers.
    """

    value: float
    null: float
    spread: float

    @property
    def stands_out(self) -> bool:
        """Whether the value is more than three spreads from the null, on either side."""
        # If signs change nothing, as in the spectrum of one gradient, the spread is only rounding.
        return abs(self.value - self.null) > max(3 * self.spread, 1e-4 * abs(self.null))

    def __str__(self) -> str:
        """Format as value (null ± spread)."""
        return f"{self.value:.3g} ({self.null:.2g} ± {self.spread:.2g})"


@dataclass(frozen=True)
class Reading:
    """Statistics of one matrix under one order and momentum.

    Attributes:
        layer: Name of the matrix.
        shape: (m, n).
        order: The replayed order.
        momentum: β; 0 for ``polar_only``.
        proxy: The mean that stands for the signal.
        statistics: ``alignment`` and ``direction`` of the update with the proxy, ``sin_left`` and
            ``sin_right`` of the leading subspaces, ``gap`` and ``effective_rank`` of the filter's
            output.
    """

    layer: str
    shape: tuple[int, int]
    order: str
    momentum: float
    proxy: str
    statistics: dict[str, Statistic]

    @property
    def flag(self) -> str:
        """Why the alignment is no evidence of a signal; empty if it is evidence."""
        alignment = self.statistics["alignment"]
        if alignment.stands_out and alignment.value > alignment.null:
            return ""
        if self.proxy == "in_buffer":
            return "as in noise: shared noise explains it"
        return "as in noise"


@dataclass(frozen=True)
class ProbeReport:
    """Readings of a probe.

    Attributes:
        readings: One per matrix, order, momentum and proxy.
    """

    readings: tuple[Reading, ...]

    @property
    def flagged(self) -> tuple[Reading, ...]:
        """Readings whose alignment is not above its null."""
        return tuple(reading for reading in self.readings if reading.flag)

    def table(self, *names: str) -> str:
        """Return a table: value (null ± spread) for each statistic.

        Args:
            *names: Statistics to show. Default: all.
        """
        names = names or tuple(self.readings[0].statistics)
        table = Table("layer", "order", "β", "proxy", *names, "flag")
        for reading in self.readings:
            table.add_row(
                reading.layer,
                reading.order,
                f"{reading.momentum:g}",
                reading.proxy,
                *(str(reading.statistics[name]) for name in names),
                reading.flag,
            )
        return text(table)

    def to_dict(self) -> dict[str, Any]:
        """Return the readings as plain values, for JSON."""
        return {
            "readings": [
                {
                    **asdict(reading),
                    "shape": list(reading.shape),
                    "flag": reading.flag,
                    "statistics": {
                        name: {**one._asdict(), "stands_out": one.stands_out}
                        for name, one in reading.statistics.items()
                    },
                }
                for reading in self.readings
            ]
        }
