"""The conclusion of a comparison of two runs, computed from their results.

In: the contents of two ``results.json``. Out: the share of the tokens after which one run reaches
the other's final loss, and sentences that give the numbers and their limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Results = Mapping[str, Any]
NAMES = {"muon": "Muon", "adamw": "AdamW"}


def tokens_to_reach(run: Results, reference: Results) -> float | None:
    """Return the share of the reference's tokens after which ``run`` reaches its final loss.

    Losses come from the evaluation curves; between points, the curve of ``run`` is interpolated
    linearly. None if the run never reaches that loss.
    """
    goal = reference["eval_curve"][-1]["loss"]
    curve = run["eval_curve"]
    for before, after in pairwise(curve):
        if after["loss"] <= goal:
            part = (before["loss"] - goal) / (before["loss"] - after["loss"])
            tokens = before["tokens"] + part * (after["tokens"] - before["tokens"])
            return tokens / reference["tokens"]
    return None


def conclusion(runs: Mapping[str, Results]) -> str:
    """Return sentences about two runs; an empty string for another number, or without curves.

    The first run is compared with the second.
    """
    if len(runs) != 2 or not all(run["eval_curve"] for run in runs.values()):
        return ""
    (first, run), (second, other) = runs.items()
    one, two = NAMES.get(first, first), NAMES.get(second, second)
    share, back = tokens_to_reach(run, other), tokens_to_reach(other, run)
    if share is not None:
        text = f"{one} reached {two}'s final loss after {share:.0%} of the tokens."
    elif back is not None:
        text = (
            f"{one} did not reach {two}'s final loss; {two} reached {one}'s after {back:.0%} of "
            "the tokens."
        )
    else:
        text = f"Neither {one} nor {two} reached the other's final loss."
    losses = [run["final_validation_loss"], other["final_validation_loss"]]
    return (
        f"{text} Validation loss at the end, on all held-out text: {one} {losses[0]:.4f}, {two} "
        f"{losses[1]:.4f}."
    )


def caveat(runs: Mapping[str, Results]) -> str:
    """Return seeds and learning rates of a comparison, and a warning about its precision."""
    seeds = sorted({run["seed"] for run in runs.values()})
    rates = []
    for label, run in runs.items():
        matrices, others = run["learning_rate"], run.get("other_learning_rate")
        others = matrices if others is None else others
        rates.append(f"{NAMES.get(label, label)} {matrices:g} and {others:g}")
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    return (
        f"One run of each, {seed}, at learning rates for matrices and for all else of "
        f"{'; '.join(rates)}. Differences of a few hundredths are within what another seed changes."
    )
