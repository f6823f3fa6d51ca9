"""The orders in real pretraining: a LLaMA and a GPT-2 on Shakespeare, rates tuned for each order.

In: only sizes. Out: held-out losses over learning rates, and over fresh seeds at the best rates,
with AdamW as the reference; stable rank of the weights; width of the plateau of good rates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from charts import grid, save
from parts import Parts
from tuning import Plan, draw_row, plateau, sentences, tune, untrained

GRIDS = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "pre_polar": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "post_polar": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1),
    "post_polar_matched": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "polar_only": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
}
STEPS = 122  # of 16 × 128 tokens: 0.25 M
WITHIN = 0.1
TITLES = {"llama": "LLaMA, 0.5 M", "gpt2": "GPT-2, 0.4 M"}


def run(parts: Parts, quick: bool) -> dict[str, Any]:
    """Return the results of every method on both models."""
    plans = {name: plan(name, quick) for name in TITLES}
    models = {name: tune(parts, plans[name]) for name in TITLES}
    at_rest = {
        name: untrained(parts, plans[name], tuned["adamw"]["best_other"])
        for name, tuned in models.items()
    }
    return {
        "steps": plans["llama"].steps,
        "models": models,
        "untrained": at_rest,
        "plateaus": {
            name: {method: plateau(part, WITHIN) for method, part in tuned.items()}
            for name, tuned in models.items()
        },
    }


def plan(world: str, quick: bool) -> Plan:
    """Return how a model is tuned."""
    if not quick:
        return Plan(world, STEPS, GRIDS)
    few = {name: rates[2:4] for name, rates in GRIDS.items()}
    sizes = {"width": 48, "layers": 2}
    return Plan(world, 20, few, seeds=(0,), fresh=(1,), widen=0, sizes=sizes)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a row of panels for each model."""
    figure, axes = grid(len(results["models"]), 3, squeeze=False)
    for row, (name, tuned) in zip(axes, results["models"].items(), strict=True):
        draw_row(row, tuned, results["untrained"][name], f"{TITLES[name]}: loss")
    save(figure, path)


def lines(results: dict[str, Any]) -> list[str]:
    """Return the results in words."""
    return [
        f"{TITLES[name]}: {line}"
        for name, tuned in results["models"].items()
        for line in sentences(tuned, results["untrained"][name], WITHIN)
    ]
