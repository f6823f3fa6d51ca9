"""Methods at their own learning rates: a grid that grows where the best is at an edge; fresh seeds.

In: a function that trains once, first grids, seeds. Out: for each method, the losses at every rate,
the best rate, and the losses there of seeds that the search has not seen. Figures of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from charts import COLORS, MARKERS, MUTED, label, logarithmic
from parts import Parts, Task
from shared.arguments import RecipeError
from study.descent import FACTOR, Point, best_point, next_points
from study.paired import mean_and_spread
from training import METHODS, train

Tuned = dict[str, dict[str, Any]]
Job = tuple[str, float, float, int]
"""Method, rate of the matrices, rate of all else, seed."""

STANDSTILL = 1e-9
"""A learning rate at which a run's updates stay far below the weights."""
LABELS = {
    "adamw": "AdamW",
    "pre_polar": "pre_polar (Muon)",
    "post_polar": "post_polar",
    "post_polar_matched": "post_polar, matched RMS",
    "polar_only": "polar_only",
}
LOOKS = dict(zip(LABELS, zip(COLORS, MARKERS, strict=False), strict=False))


@dataclass(frozen=True)
class Plan:
    """How a world is tuned.

    Attributes:
        world: a key of ``worlds.WORLDS``.
        steps: of every run.
        grids: first learning rates of each method.
        seeds: of the search.
        fresh: seeds of the comparison at the best rates.
        widen: how often a grid may grow by one rate (twice as often with two rates); 0 keeps it
            as it is.
        sizes: of model and data, where they differ from the world's.
    """

    world: str
    steps: int
    grids: Mapping[str, Sequence[float]]
    seeds: Sequence[int] = (0,)
    fresh: Sequence[int] = (1, 2, 3)
    widen: int = 5
    sizes: Mapping[str, Any] | None = None


def tune(parts: Parts, plan: Plan) -> Tuned:
    """Return the results of every method.

    AdamW comes first, with one rate for the matrices and one for everything else. Under every
    order, the parameters that Muon leaves to AdamW get the best of the latter, so that the methods
    differ only in how they treat the matrices.
    """
    tuned = searched(parts, plan, ["adamw"], None)
    other = tuned["adamw"]["best_other"]
    methods = [name for name in METHODS if name in plan.grids and name != "adamw"]
    tuned |= searched(parts, plan, methods, other)
    jobs = [(name, tuned[name]["best"], other, seed) for name in tuned for seed in plan.fresh]
    runs = trained(parts, plan, jobs)
    for name, part in tuned.items():
        part["fresh"] = summary([runs[job] for job in jobs if job[0] == name])
    return tuned


def searched(parts: Parts, plan: Plan, methods: Sequence[str], other: float | None) -> Tuned:
    """Return the results at every rate, and the best, inside its grid unless ``widen`` is 0.

    Args:
        parts: of the experiment.
        plan: first rates and seeds.
        methods: to search.
        other: the rate of all but the matrices; None searches it as well, beginning with one rate
            for both.
    """
    axes = (FACTOR, FACTOR if other is None else None)
    first = {name: [(rate, other or rate) for rate in plan.grids[name]] for name in methods}
    grids: dict[str, dict[Point, Any]] = {name: {} for name in methods}
    for _ in range(1 + plan.widen * (2 if other is None else 1)):
        waiting = [
            (name, point)
            for name in methods
            for point in next_points(losses(grids[name]), first[name], axes)
        ]
        if not waiting:
            return {name: found_of(grid) for name, grid in grids.items()}
        jobs = [(name, *point, seed) for name, point in waiting for seed in plan.seeds]
        runs = trained(parts, plan, jobs)
        for name, point in waiting:
            grids[name][point] = summary([runs[name, *point, seed] for seed in plan.seeds])
        if not plan.widen:
            return {name: found_of(grid) for name, grid in grids.items()}
    waiting = [next_points(losses(grid), [], axes) for grid in grids.values()]
    if not any(waiting):
        return {name: found_of(grid) for name, grid in grids.items()}
    raise RecipeError(
        f"{plan.world}: after {plan.widen} wider grids the best rate is still at an edge; next "
        f"would be {waiting}."
    )


def found_of(grid: Mapping[Point, Any]) -> dict[str, Any]:
    """Return the best rates, and the results for all matrix rates at the best other rate."""
    best, other = best_point(losses(grid))
    rates = {rate: at for (rate, beside), at in grid.items() if beside == other}
    return {
        "rates": [{"rate": rate, **at} for rate, at in sorted(rates.items())],
        "best": best,
        "best_other": other,
        "points_tried": len(grid),
    }


def untrained(parts: Parts, plan: Plan, other: float) -> dict[str, Any]:
    """Return the result when the matrices keep their initial values and all else is trained."""
    jobs = [("polar_only", STANDSTILL, other, seed) for seed in plan.fresh]
    return summary(list(trained(parts, plan, jobs).values()))


def losses(grid: Mapping[Point, Any]) -> dict[Point, float]:
    """Return the mean loss at every point; infinite if a run diverged."""
    return {point: at["loss"]["mean"] for point, at in grid.items()}


def means(part: Mapping[str, Any]) -> dict[float, float]:
    """Return the same for one method's results."""
    return {at["rate"]: at["loss"]["mean"] for at in part["rates"]}


def trained(parts: Parts, plan: Plan, jobs: Sequence[Job]) -> dict[Job, dict[str, Any]]:
    """Return the results of runs, by run."""
    tasks = {}
    for method, rate, other, seed in jobs:
        is_one_rate = method == "adamw" and other == rate
        arguments = {
            "world": plan.world,
            "method": method,
            "learning_rate": rate,
            "seed": seed,
            "steps": plan.steps,
            **({} if is_one_rate else {"adamw_lr": other}),
            **(plan.sizes or {}),
        }
        second = f"_other{other:g}" if method == "adamw" and not is_one_rate else ""
        tasks[f"{plan.world}_{method}_{rate:g}{second}_seed{seed}"] = Task(train, arguments)
    return dict(zip(jobs, parts(tasks).values(), strict=True))


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and spread over seeds of the values that all runs have."""
    found = {"loss": mean_and_spread([lost_is_infinite(run["loss"]) for run in runs])}
    for name in ("accuracy", "stable_rank", "effective_rank"):
        values = [run[name] for run in runs if name in run]
        if values:
            found[name] = mean_and_spread(values)
    return found


def lost_is_infinite(loss: float | None) -> float:
    """Return a loss as a number; infinite if the run diverged."""
    return math.inf if loss is None else loss


def plateau(part: Mapping[str, Any], within: float) -> float:
    """Return the ratio of the largest to the smallest rate with a loss ``within`` of the best."""
    best = min(means(part).values())
    near = [rate for rate, loss in means(part).items() if loss <= best + within]
    return max(near) / min(near)


def draw_row(
    axes: Sequence[plt.Axes], tuned: Tuned, at_rest: Mapping[str, Any], title: str
) -> None:
    """Draw losses over rates, stable ranks over rates, and the fresh seeds at the best rates."""
    rates_axis, rank_axis, best_axis = axes
    at_rest_loss = at_rest["loss"]["mean"]
    at_rest_name = f"matrices untrained: {at_rest_loss:.2f}"
    rates_axis.axhline(at_rest_loss, color=MUTED, lw=1, ls="--", label=at_rest_name)
    for name, part in tuned.items():
        color, marker = LOOKS[name]
        look = {"color": color, "marker": marker, "ms": 5, "lw": 1.3}
        finite = [at for at in part["rates"] if math.isfinite(at["loss"]["mean"])]
        for axis, value in ((rates_axis, "loss"), (rank_axis, "stable_rank")):
            means_at = [at[value]["mean"] for at in finite]
            axis.plot([at["rate"] for at in finite], means_at, label=LABELS[name], **look)
    draw_best(best_axis, tuned)
    every_second = sorted({at["rate"] for part in tuned.values() for at in part["rates"]})[::2]
    for axis in (rates_axis, rank_axis):
        logarithmic(axis.xaxis, every_second)
    everything = [v for part in tuned.values() for v in means(part).values()]
    finite_losses = [value for value in everything if math.isfinite(value)]
    best, worst = min(finite_losses), max(part_worst(part) for part in tuned.values())
    rates_axis.set_ylim(best - 0.05 * (worst - best), worst + 0.05 * (worst - best))
    rates_axis.legend(frameon=False, fontsize=8)
    label(rates_axis, "learning rate of the matrices", "held-out loss", title)
    label(rank_axis, "learning rate of the matrices", "", "stable rank of the weights, mean")


def draw_best(axes: plt.Axes, tuned: Tuned) -> None:
    """Draw the fresh seeds at the best rates; AdamW is written at the edge if it is far off."""
    names = list(tuned)
    for height, name in enumerate(names):
        color, marker = LOOKS[name]
        values = tuned[name]["fresh"]["loss"]["values"]
        axes.plot(values, [height] * len(values), marker, color=color, ms=6, alpha=0.8)
    orders = [
        v for name in names if name != "adamw" for v in tuned[name]["fresh"]["loss"]["values"]
    ]
    reach = max(orders) - min(orders)
    adamw = tuned["adamw"]["fresh"]["loss"]["mean"]
    if adamw > max(orders) + reach:
        axes.set_xlim(min(orders) - 0.1 * reach, max(orders) + 0.3 * reach)
        axes.text(
            0.98, names.index("adamw"), f"{adamw:.2f} →", color=LOOKS["adamw"][0],
            transform=axes.get_yaxis_transform(), ha="right", va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    label(axes, "held-out loss", "", "fresh seeds at the best rate")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)


def part_worst(part: Mapping[str, Any]) -> float:
    """Return the highest loss to draw for a method: within a factor of 8 of its best rate."""
    near = [
        loss
        for rate, loss in means(part).items()
        if part["best"] / 8.1 <= rate <= part["best"] * 8.1 and math.isfinite(loss)
    ]
    return max(near)


def sentences(tuned: Tuned, at_rest: Mapping[str, Any], within: float) -> list[str]:
    """Return a line per method."""
    said = []
    for name, part in tuned.items():
        loss, rank = part["fresh"]["loss"], part["fresh"]["stable_rank"]["mean"]
        spread = "" if loss["spread"] is None else f" ± {loss['spread']:.4f}"
        accuracy = part["fresh"].get("accuracy")
        right = f", accuracy {accuracy['mean']:.4f}" if accuracy else ""
        said.append(
            f"{LABELS[name]}: rate {part['best']:g} (all else {part['best_other']:g}), "
            f"loss {loss['mean']:.4f}{spread}{right}, stable rank {rank:.1f}, "
            f"plateau ×{plateau(part, within):g}"
        )
    said.append(f"matrices untrained: loss {at_rest['loss']['mean']:.4f}")
    return said
