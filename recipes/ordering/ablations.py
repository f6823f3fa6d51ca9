"""What the filter's gain depends on: kind of noise, strength, width and drift.

In: variations of a stream with a signal of rank 1. Out: over the window, alignment and angle of the
leading direction after the filter, with closed forms where they exist; and the updates of the three
orders on the same gradients at T = 20.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from charts import COLORS, MARKERS, grid, label, logarithmic, save
from parts import Parts, Task
from streams import averages, mean_and_error, stream_of
from theory import seen, window_of

from hf_muon import diagnostics

BASE = {"m": 64, "n": 64, "strengths": [0.5], "sigma": 64**-0.5}
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
CLIP = 3.0
"""In deviations of an entry: entries beyond are cut before they are averaged."""
ORDERS = ("pre_polar", "post_polar", "polar_only")

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "noise": {
        "Gaussian": {},
        "ARCH, α = 0.3": {"noise": "arch"},
        "Student, ν = 3": {"noise": "student_t"},
        "Student, ν = 1.5": {"noise": "student_t", "degrees_of_freedom": 1.5},
        "ν = 1.5, entries clipped": {
            "noise": "student_t", "degrees_of_freedom": 1.5, "clip": CLIP,
        },
    },
    "strength": {f"λ = {value:g}": {"strengths": [value]} for value in (0.125, 0.25, 0.5, 1, 2)},
    "width": {
        f"{m} × {n}": {"m": m, "n": n, "sigma": m**-0.5}
        for m, n in ((16, 16), (64, 64), (192, 192), (192, 48), (48, 192))
    },
    "drift": {
        f"{value:g} rad a step": {"drift": value} for value in (0.0, 0.001, 0.003, 0.01, 0.03)
    },
}  # fmt: skip


def run(parts: Parts, quick: bool) -> dict[str, Any]:
    """Return every case of every ablation."""
    size = {"copies": 4, "steps": 200} if quick else {"copies": 8, "steps": 1000}
    tasks = {
        f"{ablation}_{index}": Task(measure, {"settings": BASE | size | changes})
        for ablation, cases in CASES.items()
        for index, changes in enumerate(cases.values())
    }
    measured = parts(tasks)
    return {
        "settings": BASE | size,
        "ablations": {
            ablation: {name: measured[f"{ablation}_{index}"] for index, name in enumerate(cases)}
            for ablation, cases in CASES.items()
        },
    }


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the curves of one case over the window, and the three orders at T = 20."""
    settings = dict(settings)
    clip = settings.pop("clip", None)
    deviation, shape = settings["sigma"], (settings["m"], settings["n"])
    bound = torch.inf if clip is None else clip * deviation
    cut = partial(torch.clamp, min=-bound, max=bound)
    filtered, last = averages(stream_of(settings), MOMENTA, cut)
    # The closed forms hold for a fixed signal in noise with finite variance.
    fixed = not settings.get("drift") and settings.get("degrees_of_freedom", 3) > 2
    rows = []
    for momentum, average in filtered.items():
        window = window_of(momentum)
        form = seen(settings["strengths"][0], deviation, shape, window)
        angles = diagnostics.principal_angles(average, last.signal, 1)
        rows.append(
            {
                "window": window,
                "alignment": mean_and_error(diagnostics.signal_alignment(average, last.signal, 1)),
                "sin_left": mean_and_error(angles.sin_left),
                "theory": {"alignment": form.alignment, "sin_left": form.sin_left} if fixed else {},
            }
        )
    return {"rows": rows, "orders": at_one_window(settings, cut)}


def at_one_window(settings: dict[str, Any], cut: Any, momentum: float = 0.95) -> dict[str, Any]:
    """Return alignment and direction of the orders over the same gradients."""
    observed = list(stream_of(settings | {"steps": min(200, settings["steps"])}))
    gradients, signal = torch.stack([one.gradient for one in observed]), observed[-1].signal
    found = {}
    for order in ORDERS:
        update = diagnostics.replay(gradients, order, momentum, False, before=partial(map, cut))[-1]
        found[order] = {
            "alignment": mean_and_error(diagnostics.signal_alignment(update, signal)),
            "direction": mean_and_error(diagnostics.direction_alignment(update, signal)),
        }
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a panel for each ablation."""
    figure, axes = grid(2, 2)
    titles = {
        "noise": "kind of noise",
        "strength": "strength of the signal",
        "width": "width, entries of deviation 1/√m",
        "drift": "drift of its directions",
    }
    for panel, (ablation, cases) in zip(axes.flat, results["ablations"].items(), strict=True):
        draw_cases(panel, cases)
        label(panel, "window T", "alignment of the leading direction", titles[ablation])
    save(figure, path)


def draw_cases(panel: plt.Axes, cases: dict[str, Any]) -> None:
    """Draw the alignment over the window, with closed forms where they exist."""
    for (name, case), color, marker in zip(cases.items(), COLORS, MARKERS, strict=False):
        windows = [row["window"] for row in case["rows"]]
        values = [row["alignment"] for row in case["rows"]]
        means, errors = ([value[key] for value in values] for key in ("mean", "error"))
        has_theory = bool(case["rows"][0]["theory"])
        line = "none" if has_theory else ":"
        panel.errorbar(
            windows, means, errors, color=color, marker=marker, ms=5, lw=1.2, ls=line, label=name
        )
        if has_theory:
            forms = [row["theory"]["alignment"] for row in case["rows"]]
            panel.plot(windows, forms, color=color, lw=1)
    logarithmic(panel.xaxis, windows)
    panel.set_ylim(-0.05, 1.05)
    panel.legend(frameon=False, fontsize=8)


def lines(results: dict[str, Any]) -> list[str]:
    """Return the best window of every case, and the orders at T = 20."""
    said = []
    for ablation, cases in results["ablations"].items():
        for name, case in cases.items():
            best = max(case["rows"], key=lambda row: row["alignment"]["mean"])
            orders = ", ".join(
                f"{order} {value['alignment']['mean']:.2f}/{value['direction']['mean']:.2f}"
                for order, value in case["orders"].items()
            )
            said.append(
                f"{ablation}, {name}: best at T = {best['window']:.0f} "
                f"({best['alignment']['mean']:.2f}); alignment/direction at T = 20: {orders}"
            )
    return said
