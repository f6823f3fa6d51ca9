"""The published grid of spectra in ARCH noise: singular values over β.

In: a signal of rank 3 in ARCH(1) noise, 100 × 100, 1000 steps, and momenta. Out: σ₁ … σ₄ of the
average as means over seeds, with their spread and the closed forms for white noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from charts import COLORS, INK, grid, label, logarithmic, save
from parts import Parts, Task
from streams import averages, stream_of
from theory import noise_edge, seen, window_of

SETTINGS = {
    "m": 100, "n": 100, "strengths": [12.0, 8.0, 5.0], "sigma": 1.0, "noise": "arch", "arch": 0.3,
}  # fmt: skip
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
PUBLISHED = {0.95: [12.22, 8.25, 5.50, 3.09]}
"""From arXiv 2606.03899."""


def run(parts: Parts, quick: bool) -> dict[str, Any]:
    """Return the table."""
    size = {"copies": 8, "steps": 200} if quick else {"copies": 32, "steps": 1000}
    settings = SETTINGS | size
    measured = parts({"arch": Task(measure, {"settings": settings, "momenta": MOMENTA})})
    return {"settings": settings, "rows": measured["arch"], "published": PUBLISHED}


def measure(settings: dict[str, Any], momenta: Sequence[float]) -> list[dict[str, Any]]:
    """Return σ₁ … σ₄ for every momentum, over seeds, with the closed forms for white noise."""
    filtered, _ = averages(stream_of(settings), momenta)
    shape, deviation = (settings["m"], settings["n"]), settings["sigma"]
    rows = []
    for momentum, average in filtered.items():
        window = window_of(momentum)
        sigma = torch.linalg.svdvals(average)[:, :4]
        forms = [seen(strength, deviation, shape, window) for strength in settings["strengths"]]
        rows.append(
            {
                "momentum": momentum,
                "sigma": sigma.mean(0).tolist(),
                "spread": sigma.std(0).tolist(),
                "error": (sigma.std(0) / math.sqrt(len(sigma))).tolist(),
                "theory": [form.sigma for form in forms] + [noise_edge(deviation, shape, window)],
            }
        )
    return rows


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the four singular values over the window, with the closed forms."""
    figure, axes = grid(1, 1)
    rows = results["rows"]
    lengths = [2 * window_of(row["momentum"]) - 1 for row in rows]
    for index, color in zip(range(4), COLORS, strict=False):
        values = [row["sigma"][index] for row in rows]
        spreads = [row["spread"][index] for row in rows]
        name = f"σ{'₁₂₃₄'[index]}"
        axes.errorbar(lengths, values, spreads, fmt="o", ms=5, lw=1.2, color=color, label=name)
        axes.plot(lengths, [row["theory"][index] for row in rows], lw=1, color=color)
    for momentum, values in results["published"].items():
        length = 2 * window_of(float(momentum)) - 1
        axes.plot([length] * 4, values, "x", color=INK, ms=8, label="published", zorder=3)
    logarithmic(axes.xaxis, lengths)
    logarithmic(axes.yaxis, (2, 3, 5, 8, 12, 20))
    axes.legend(frameon=False, fontsize=9)
    label(axes, "2T − 1", "singular values of the average", "ARCH noise (lines: closed forms)")
    save(figure, path)


def lines(results: dict[str, Any]) -> list[str]:
    """Return the table, in words."""
    return [
        f"β = {row['momentum']:g}: "
        + " / ".join(f"{value:.2f}" for value in row["sigma"])
        + " (closed forms "
        + " / ".join(f"{value:.2f}" for value in row["theory"])
        + ")"
        for row in results["rows"]
    ]
