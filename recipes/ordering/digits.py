"""The control: a small ViT on scikit-learn's digits, where AdamW may win.

In: only sizes. Out: held-out loss and accuracy of AdamW and of the three orders over learning
rates, and over fresh seeds at the best rates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from charts import grid, save
from parts import Parts
from tuning import Plan, draw_row, plateau, sentences, tune, untrained

GRIDS = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
    "pre_polar": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "post_polar": (1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1),
    "post_polar_matched": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "polar_only": (4e-3, 8e-3, 1.6e-2, 3.2e-2),
}
STEPS = 330  # of 128 images: 29 epochs
WITHIN = 0.02


def run(parts: Parts, quick: bool) -> dict[str, Any]:
    """Return the results of every method."""
    plan = Plan("digits", STEPS, GRIDS)
    if quick:
        few = {name: rates[1:3] for name, rates in GRIDS.items()}
        sizes = {"width": 32, "layers": 2}
        plan = Plan("digits", 40, few, seeds=(0,), fresh=(1,), widen=0, sizes=sizes)
    tuned = tune(parts, plan)
    at_rest = untrained(parts, plan, tuned["adamw"]["best_other"])
    plateaus = {name: plateau(part, WITHIN) for name, part in tuned.items()}
    return {"steps": plan.steps, "methods": tuned, "untrained": at_rest, "plateaus": plateaus}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw losses and ranks over rates, and the fresh seeds."""
    figure, axes = grid(1, 3)
    draw_row(axes, results["methods"], results["untrained"], "ViT on digits: loss")
    save(figure, path)


def lines(results: dict[str, Any]) -> list[str]:
    """Return the results in words."""
    return sentences(results["methods"], results["untrained"], WITHIN)
