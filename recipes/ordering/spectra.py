"""The effect of a momentum filter on a spectrum: singular values and angles over β.

In: a fixed signal of rank 3 in white noise, and momenta. Out: the spectrum after each filter with
its closed forms, and the slopes of noise and angles over the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from charts import COLORS, MUTED, grid, label, logarithmic, save
from parts import Parts, Task
from streams import averages, log_slope, mean_and_error, stream_of
from theory import noise_edge, seen, window_of

from hf_muon import diagnostics

SETTINGS = {"m": 128, "n": 96, "strengths": [1.5, 0.8, 0.4], "sigma": 128**-0.5}
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)


def run(parts: Parts, quick: bool) -> dict[str, Any]:
    """Return spectra, angles and their closed forms by β."""
    size = {"copies": 8, "steps": 200} if quick else {"copies": 48, "steps": 500}
    settings = SETTINGS | size
    measured = parts({"spectra": Task(measure, {"settings": settings, "momenta": MOMENTA})})
    rows = measured["spectra"]
    # The rows in which all of the signal is visible, so that the next singular value is noise.
    late = [row for row in rows if row["theory"]["visible"] == len(SETTINGS["strengths"])]
    lengths = [2 * row["window"] - 1 for row in late]
    slopes = {
        "noise": log_slope(lengths, [row["sigma"][3] for row in late]),
        "smallest": log_slope(lengths, [row["sigma"][-1] for row in late]),
        "sin_left": log_slope(lengths, [row["sin_left"]["mean"] for row in late]),
        "sin_right": log_slope(lengths, [row["sin_right"]["mean"] for row in late]),
    }
    return {"settings": settings, "rows": rows, "slopes": slopes}


def measure(settings: dict[str, Any], momenta: Sequence[float]) -> list[dict[str, Any]]:
    """Return one row per momentum: the spectrum, the angles of the strongest direction, theory."""
    filtered, last = averages(stream_of(settings), momenta)
    shape, deviation = (settings["m"], settings["n"]), settings["sigma"]
    rows = []
    for momentum, average in filtered.items():
        window = window_of(momentum)
        forms = [seen(strength, deviation, shape, window) for strength in settings["strengths"]]
        angles = diagnostics.principal_angles(average, last.signal, 1)
        suppressed = diagnostics.noise_suppression(last.gradient, average, last.signal)
        rows.append(
            {
                "momentum": momentum,
                "window": window,
                "sigma": torch.linalg.svdvals(average).mean(0).tolist(),
                "sin_left": mean_and_error(angles.sin_left),
                "sin_right": mean_and_error(angles.sin_right),
                "alignment": mean_and_error(
                    diagnostics.signal_alignment(average, strongest(last.signal), 1)
                ),
                "noise_suppression": suppressed.square().mean().sqrt().item(),
                "theory": {
                    "sigma": [form.sigma for form in forms],
                    "edge": noise_edge(deviation, shape, window),
                    "visible": sum(form.visible for form in forms),
                    "sin_left": forms[0].sin_left,
                    "sin_right": forms[0].sin_right,
                    "alignment": forms[0].alignment,
                    "noise_suppression": (2 * window - 1) ** 0.5,
                },
            }
        )
    return rows


def strongest(signal: torch.Tensor) -> torch.Tensor:
    """Return the part of a signal that belongs to its largest singular value."""
    U, sigma, Vh = torch.linalg.svd(signal, full_matrices=False)
    return sigma[..., :1, None] * U[..., :1] @ Vh[..., :1, :]


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the spectra by index, and noise and angles over the window."""
    figure, (left, right) = grid(1, 2)
    for color, row in zip(COLORS, results["rows"], strict=True):
        shown = row["sigma"][:24]
        left.plot(range(1, len(shown) + 1), shown, "o-", ms=3, lw=1, color=color)
        left.axhline(row["theory"]["edge"], color=color, lw=0.7, ls=":")
        left.annotate(
            f"β = {row['momentum']:g}", (24, shown[-1]), (4, 0), textcoords="offset points",
            va="center", color=color, fontsize=9,
        )  # fmt: skip
    logarithmic(left.yaxis, (0.1, 0.2, 0.5, 1, 2))
    label(left, "index k", "σₖ of the average", "spectra behind the filter (dotted: noise edge)")
    rows = results["rows"]
    lengths = [2 * row["window"] - 1 for row in rows]
    curves = {
        "σ₁ (signal)": ([row["sigma"][0] for row in rows], [r["theory"]["sigma"][0] for r in rows]),
        "σ₄ (noise)": ([row["sigma"][3] for row in rows], [r["theory"]["edge"] for r in rows]),
        "sin ∠U": ([r["sin_left"]["mean"] for r in rows], [r["theory"]["sin_left"] for r in rows]),
        "sin ∠V": (
            [row["sin_right"]["mean"] for row in rows],
            [row["theory"]["sin_right"] for row in rows],
        ),
    }
    for color, (name, (measured, theory)) in zip(COLORS, curves.items(), strict=False):
        right.plot(lengths, measured, "o", ms=5, color=color, label=name)
        right.plot(lengths, theory, lw=1, color=color)
    bound = [curves["σ₄ (noise)"][1][0] * length**-0.25 for length in lengths]
    right.plot(lengths, bound, ls="--", lw=1, color=MUTED, label="slope −1/4 (bound)")
    logarithmic(right.xaxis, lengths)
    logarithmic(right.yaxis, (0.05, 0.1, 0.2, 0.5, 1, 2))
    right.legend(frameon=False, fontsize=9)
    label(right, "2T − 1", "", "measured (points) and closed forms (lines)")
    save(figure, path)


def lines(results: dict[str, Any]) -> list[str]:
    """Return the results in words."""
    slopes = ", ".join(f"{name} {slope:.3f}" for name, slope in results["slopes"].items())
    return [f"slopes over 2T − 1: {slopes}"]
