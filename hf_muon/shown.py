"""Counts, sizes and shapes as short text.

In: whole numbers, and shapes. Out: text for tables, log lines and pages. Sizes are in MB (10⁶
bytes); shapes are written as 256 × 344.
"""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = (("", 1), (" k", 10**3), (" M", 10**6), (" B", 10**9), (" T", 10**12))


def count(number: int) -> str:
    """Format a count with three digits and a unit: ``33``, ``106 k``, ``1.32 M``, ``6.74 B``."""
    # From 0.9995 of a unit on, the next smaller unit would round to 1000.
    unit, size = next((u for u in reversed(_UNITS) if number >= 0.9995 * u[1]), _UNITS[0])
    value = number / size
    decimals = 0 if size == 1 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}{unit}"


def megabytes(size: float) -> str:
    """Format bytes in MB: ``0.0614 MB``, ``7.4 MB``, ``1,710 MB``."""
    value = size / 1e6
    return f"{value:,.0f} MB" if value >= 99.95 else f"{value:.3g} MB"


def shape(sides: Sequence[int]) -> str:
    """Format a shape: ``256 × 344``; a scalar is ``1``."""
    return " × ".join(map(str, sides)) or "1"
