"""The three orders on a known signal: how much of an update is signal, over the window.

In: a fixed signal of rank 1 in white noise, and momenta. Out: alignment, its direction and the size
of the update of each order; for ``post_polar`` also with ``match_update_rms``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from charts import COLORS, MARKERS, MUTED, grid, label, logarithmic, save
from parts import Parts, Task
from streams import mean_and_error, stream_of
from theory import seen, window_of

from hf_muon import diagnostics

SETTINGS = {"m": 48, "n": 64, "strengths": [0.5], "sigma": 48**-0.5}
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
RUN_IN, TAKEN = 10, 4
"""Windows: ten leave e⁻¹⁰ of the empty start; four more are averaged, as single steps scatter."""
VARIANTS: dict[str, dict[str, Any]] = {
    "pre_polar": {"order": "pre_polar"},
    "post_polar": {"order": "post_polar"},
    "post_polar, matched RMS": {"order": "post_polar", "match_update_rms": True},
    "polar_only": {"order": "polar_only"},
}
LOOKS = dict(zip(VARIANTS, zip(COLORS, MARKERS, strict=True), strict=False))


def run(parts: Parts, quick: bool) -> dict[str, Any]:
    """Return the results of every order at every window."""
    settings = SETTINGS | ({"copies": 8} if quick else {"copies": 32})
    momenta = MOMENTA[:-1] if quick else MOMENTA
    measured = parts(
        {
            f"beta_{momentum:g}": Task(measure, {"settings": settings, "momentum": momentum})
            for momentum in momenta
        }
    )
    return {"settings": settings, "rows": [measured[f"beta_{m:g}"] for m in momenta]}


def measure(settings: dict[str, Any], momentum: float) -> dict[str, Any]:
    """Return alignment, direction and RMS of the last update of each variant, over the copies."""
    window = window_of(momentum)
    taken = math.ceil(TAKEN * window)
    steps = math.ceil(RUN_IN * window) + taken
    observed = list(stream_of(settings | {"steps": steps}))
    gradients = torch.stack([one.gradient for one in observed])
    signal = observed[-1].signal
    found = {}
    alignments = {}
    for name, variant in VARIANTS.items():
        updates = diagnostics.replay(gradients, momentum=momentum, nesterov=False, **variant)
        updates = updates[-taken:]
        alignments[name] = diagnostics.signal_alignment(updates, signal).mean(0)
        found[name] = {
            "alignment": mean_and_error(alignments[name]),
            "direction": mean_and_error(diagnostics.direction_alignment(updates, signal).mean(0)),
            "rms": mean_and_error(updates.square().mean((-2, -1)).sqrt().mean(0)),
        }
    # Copy by copy: both orders see the same gradients, so part of the variation cancels.
    difference = mean_and_error(alignments["post_polar"] - alignments["polar_only"])
    shape = (settings["m"], settings["n"])
    theory = seen(settings["strengths"][0], settings["sigma"], shape, window)
    return {
        "momentum": momentum,
        "window": window,
        "orders": found,
        "post_minus_only": difference,
        "theory": theory.alignment,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw alignment, direction and size over the window."""
    figure, axes = grid(1, 3)
    rows = results["rows"]
    windows = [row["window"] for row in rows]
    for panel, quantity in zip(axes, ("alignment", "direction", "rms"), strict=True):
        for name, (color, marker) in LOOKS.items():
            values = [row["orders"][name][quantity] for row in rows]
            means, errors = ([value[key] for value in values] for key in ("mean", "error"))
            panel.errorbar(
                windows, means, errors, color=color, marker=marker, ms=5, lw=1.2, label=name
            )
        logarithmic(panel.xaxis, windows)
    axes[0].plot(
        windows,
        [row["theory"] for row in rows],
        ls="--",
        color=MUTED,
        label="leading direction,\nclosed form",
    )
    label(axes[0], "window T", "⟨update, S⟩ / ‖S‖_*", "signal alignment")
    label(axes[1], "window T", "cosine with the signal", "direction")
    label(axes[2], "window T", "RMS of the update", "size")
    axes[2].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def lines(results: dict[str, Any]) -> list[str]:
    """Return the results in words."""
    last = results["rows"][-1]
    words = [
        f"T = {last['window']:.0f}: {name} alignment {value['alignment']['mean']:.3f}, "
        f"direction {value['direction']['mean']:.3f}, RMS {value['rms']['mean']:.4f}"
        for name, value in last["orders"].items()
    ]
    worst = max(
        abs(row["post_minus_only"]["mean"]) / row["post_minus_only"]["error"]
        for row in results["rows"]
        if row["momentum"] > 0
    )
    return [*words, f"post_polar − polar_only: at most {worst:.1f} standard errors"]
