"""What a study of several runs needs: a folder that is its own, grids that are wide enough, means.

In: settings, losses by learning rate, values over seeds. Out: a marked folder, the next rate to
try, mean and spread.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.arguments import RecipeError

FACTOR = 2.0
"""Ratio of neighbouring learning rates of a grid."""


def split_extra(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line at ``--``: our own arguments, and those of every training."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def claim_folder(out: Path, config: Path, extra: Sequence[str]) -> None:
    """Note what the folder's runs are runs of, and refuse to mix them with others."""
    mark = out / "settings.txt"
    content = f"{config.read_text(encoding='utf8')}\n# {shlex.join(extra)}\n"
    if mark.is_file() and mark.read_text(encoding="utf8") != content:
        raise RecipeError(
            f"The runs in {out} had other settings ({mark}). Choose another --out, or delete it."
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(content, encoding="utf8")


def beyond_edge(grid: Mapping[float, float]) -> list[float]:
    """Return the next rate when the best one is the smallest or the largest, else nothing."""
    rates = sorted(grid)
    best = min(rates, key=grid.__getitem__)
    if best == rates[0]:
        return [best / FACTOR]
    return [best * FACTOR] if best == rates[-1] else []


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None where it has none) and the values."""
    measurable = len(values) > 1 and all(map(math.isfinite, values))
    spread = statistics.stdev(values) if measurable else None
    return {"mean": statistics.fmean(values), "spread": spread, "values": list(values)}
