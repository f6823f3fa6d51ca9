"""Energy and CPU time of a training.

In: a start and an end. Out: joules of all processor packages by their counters (RAPL under Linux;
on most systems only root can read them), or None; CPU seconds of this process.
"""

from __future__ import annotations

import time
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Measures energy and CPU time between :meth:`start` and :meth:`stop`.

    The counters cover whole processors: energy includes everything else that runs on them.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        # intel-rapl:0 is a processor, intel-rapl:0:1 a part of it. AMD uses the same names.
        self._packages = sorted(p for p in folder.glob("*-rapl:*") if p.name.count(":") == 1)
        self.joules: float | None = None
        self.cpu_seconds: float | None = None

    def start(self) -> None:
        """Start to measure."""
        self._cpu, self._counters = time.process_time(), self._read()

    def stop(self) -> None:
        """Store what was used since the start in ``joules`` and ``cpu_seconds``."""
        self.cpu_seconds = round(time.process_time() - self._cpu, 1)
        now = self._read()
        if self._counters and now and len(now) == len(self._counters):
            used = zip(self._packages, self._counters, now, strict=True)
            self.joules = round(sum(self._since(*one) for one in used) / 1e6, 1)

    def _read(self) -> list[int]:
        """Return the microjoules of each processor; an empty list if any cannot be read."""
        try:
            return [int((package / "energy_uj").read_text()) for package in self._packages]
        except (OSError, ValueError):
            return []

    @staticmethod
    def _since(package: Path, before: int, now: int) -> int:
        """Return the difference of two readings of a counter that wraps around at most once."""
        if now >= before:
            return now - before
        return now - before + int((package / "max_energy_range_uj").read_text())
