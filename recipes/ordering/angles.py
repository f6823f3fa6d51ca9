"""Real gradients over the window: a LLaMA at several checkpoints, stationary and along its way.

In: only sizes. Out: sin Θ of the filter's output and alignment of the updates with the mean of
held-out gradients, for every order and window; the same with the in-buffer mean, for contrast; and
the null of every number. Means are over four matrices and over seeds. The model trains at a good
learning rate and at a sixteenth of it, because the steps are what turns the signal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from charts import COLORS, INK, MARKERS, MUTED, grid, label, logarithmic, save
from parts import Parts, Task
from theory import window_of
from training import trainer_of
from transformers import TrainerCallback, set_seed
from worlds import WORLDS, World

from hf_muon.diagnostics import TrajectoryProbe, stationary_probe
from hf_muon.diagnostics.probe_report import ProbeReport

LAYERS = r"layers\.1\.(self_attn\.(q|v)_proj|mlp\.(up|down)_proj)"
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95)
STATISTICS = ("alignment", "direction", "sin_left", "sin_right")
RATES = {"good rate": 1.6e-2, "a sixteenth": 1e-3}
ADAMW_SHARE = 0.5
"""Rate of what Muon leaves to AdamW, as a share of the matrices'."""
PANELS = (("stationary", "good rate"), ("trajectory", "good rate"), ("trajectory", "a sixteenth"))

FULL = {"steps": 240, "checkpoints": [0, 80, 160, 240], "replayed": 64, "held_out": 64, "ahead": 16}
QUICK = {"steps": 48, "checkpoints": [0, 24, 48], "replayed": 16, "held_out": 16, "ahead": 8}


def run(parts: Parts, quick: bool) -> dict[str, Any]:
    """Return the mean of every statistic by rate, kind of probe, step, order and window."""
    size = QUICK | {"width": 48, "layers": 2} if quick else FULL
    seeds = (0,) if quick else (0, 1)
    tasks = {
        f"rate_{rate:g}_seed{seed}": Task(measure, {"learning_rate": rate, "seed": seed, **size})
        for rate in RATES.values()
        for seed in seeds
    }
    found = parts(tasks)
    rows = [
        {"rate": name, **row}
        for name, rate in RATES.items()
        for row in means([row for seed in seeds for row in found[f"rate_{rate:g}_seed{seed}"]])
    ]
    return {"settings": size, "rates": RATES, "seeds": seeds, "rows": rows}


def measure(
    learning_rate: float,
    seed: int,
    steps: int,
    checkpoints: Sequence[int],
    replayed: int,
    held_out: int,
    ahead: int,
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Train once, and probe at the checkpoints.

    Args:
        learning_rate: of the matrices.
        seed: of weights and data.
        steps: of the training.
        checkpoints: steps at which to probe; trajectory probes only once the buffer is full.
        replayed: number of gradients to replay.
        held_out: number of gradients at fixed weights whose mean is the proxy of the signal.
        ahead: the same for trajectory probes: gradients of the following steps.
        **sizes: of the model.
    """
    world = WORLDS["llama"](steps=steps, **sizes)
    set_seed(seed)
    model = world.build()
    probing = Probing(world, model, checkpoints, replayed, held_out, ahead, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            world,
            model,
            folder,
            "pre_polar",
            learning_rate,
            seed,
            steps,
            ADAMW_SHARE * learning_rate,
        )
        trainer.add_callback(probing)
        trainer.train()
    return probing.readings


class Probing(TrainerCallback):
    """Records the gradients of every step, and probes at the checkpoints."""

    def __init__(
        self,
        world: World,
        model: torch.nn.Module,
        checkpoints: Sequence[int],
        replayed: int,
        held_out: int,
        ahead: int,
        seed: int,
    ) -> None:
        self.world, self.model, self.checkpoints = world, model, checkpoints
        self.count, self.seed = replayed + held_out, seed
        self.trajectory = TrajectoryProbe(model, window=replayed, held_out=ahead, layers=LAYERS)
        self.readings: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Probe the untrained model."""
        self._probe(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Copy the clipped gradients that the optimizer is about to use."""
        self.trajectory.record()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Probe if the step is a checkpoint."""
        self._probe(state.global_step)

    def _probe(self, step: int) -> None:
        if step not in self.checkpoints:
            return
        settings = {"momenta": MOMENTA, "nesterov": False, "proxy": "both"}
        batches = other_batches(self.world, self.count, self.seed + 1000 * step)
        at_rest = stationary_probe(self.model, batches, layers=LAYERS, **settings)
        self.readings += flat(at_rest, "stationary", step)
        if self.trajectory.is_full:
            self.readings += flat(self.trajectory.report(**settings), "trajectory", step)


def other_batches(world: World, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield batches of the training's size; no block appears twice."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(world.train), generator=generator)[: count * world.batch]
    for rows in order.split(world.batch):
        yield world.collate([world.train[row] for row in rows.tolist()])


def flat(report: ProbeReport, kind: str, step: int) -> list[dict[str, Any]]:
    """Return the readings of a report as plain rows."""
    return [
        {
            "kind": kind,
            "step": step,
            "layer": reading.layer,
            "order": reading.order,
            "window": window_of(reading.momentum),
            "proxy": reading.proxy,
            **{name: reading.statistics[name].value for name in STATISTICS},
            "null": reading.statistics["alignment"].null,
        }
        for reading in report.readings
    ]


def means(readings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average the readings over matrices and seeds."""
    keys = ("kind", "step", "order", "window", "proxy")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for reading in readings:
        groups.setdefault(tuple(reading[key] for key in keys), []).append(reading)
    return [
        dict(zip(keys, group, strict=True))
        | {name: average([row[name] for row in rows]) for name in (*STATISTICS, "null")}
        for group, rows in groups.items()
    ]


def average(values: Sequence[float]) -> float:
    """Return a mean."""
    return sum(values) / len(values)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a row for each kind of probe: sin Θ and alignment over T, then the orders at the end."""
    figure, axes = grid(len(PANELS), 3)
    for panels, (kind, rate) in zip(axes, PANELS, strict=True):
        rows = [row for row in results["rows"] if (row["kind"], row["rate"]) == (kind, rate)]
        draw_kind(panels, rows, f"{kind}, {rate}")
    save(figure, path)


def draw_kind(axes: Sequence[plt.Axes], rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the panels of one kind of probe."""
    steps = sorted({row["step"] for row in rows})
    for step, color, marker in zip(steps, COLORS, MARKERS, strict=False):
        at = curve(rows, "pre_polar", "held_out", step)
        look = {"color": color, "marker": marker, "ms": 5, "lw": 1.3, "label": f"step {step}"}
        axes[0].plot(*points(at, "sin_left"), **look)
        axes[1].plot(*points(at, "alignment"), **look)
        axes[1].plot(*points(at, "null"), color=color, lw=0.8, ls=":")
    for order, color, marker in zip(("pre_polar", "post_polar"), COLORS, MARKERS, strict=False):
        at = curve(rows, order, "held_out", steps[-1])
        axes[2].plot(*points(at, "alignment"), color=color, marker=marker, ms=5, label=order)
    (alone,) = curve(rows, "polar_only", "held_out", steps[-1])
    axes[2].axhline(alone["alignment"], color=COLORS[2], lw=1.3, label="polar_only")
    buffer = curve(rows, "pre_polar", "in_buffer", steps[-1])
    axes[2].plot(*points(buffer, "alignment"), color=MUTED, lw=1.3, label="pre_polar, in buffer")
    axes[2].plot(*points(buffer, "null"), color=INK, lw=1, ls=":", label="… its null")
    for panel in axes:
        logarithmic(panel.xaxis, sorted({row["window"] for row in rows}))
    label(axes[0], "window T", "sin ∠U", f"{title}: leading direction")
    label(axes[1], "window T", "alignment", "pre_polar, held out (dotted: null)")
    label(axes[2], "window T", "alignment", f"orders at step {steps[-1]}")
    axes[0].legend(frameon=False, fontsize=8)
    axes[2].legend(frameon=False, fontsize=8)


def curve(
    rows: Sequence[dict[str, Any]], order: str, proxy: str, step: int
) -> list[dict[str, Any]]:
    """Return the rows of one order, proxy and step, by window."""
    chosen = [
        row
        for row in rows
        if row["order"] == order and row["proxy"] == proxy and row["step"] == step
    ]
    return sorted(chosen, key=lambda row: row["window"])


def points(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return windows and values."""
    return [row["window"] for row in rows], [row[name] for row in rows]


def lines(results: dict[str, Any]) -> list[str]:
    """Return the last checkpoint at the longest window, in words."""
    longest = max(row["window"] for row in results["rows"])
    said = []
    for kind, rate in PANELS:
        rows = [row for row in results["rows"] if (row["kind"], row["rate"]) == (kind, rate)]
        step = max(row["step"] for row in rows)
        for row in rows:
            if row["step"] == step and (row["window"] == longest or row["order"] == "polar_only"):
                said.append(
                    f"{kind}, {rate}, step {step}, {row['order']}, {row['proxy']}: alignment "
                    f"{row['alignment']:.3f} (null {row['null']:.3f}), direction "
                    f"{row['direction']:.3f}, sin ∠U {row['sin_left']:.3f}"
                )
    return said
