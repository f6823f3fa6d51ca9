"""Time against error of the polar factor, on the momentum of a training.

In: checkpoints of a Trainer that trained with Muon, compute dtype, threads. Out: for the square and
for the other matrices, a row per family of coefficients and number of steps: error against the
float64 SVD, and speed relative to five steps of the quintic; stable ranks of the momentum; a
figure, and JSON. Contenders take turns on the same matrices, so that a busy machine slows all of
them; ratios are taken within each round. Small matrices of one shape are computed in a batch, as in
a step, except for the quintic.

    python scripts/bench/pareto.py runs/momentum/checkpoint-200 --figure pareto.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turns import take_turns

from hf_muon.polar import Workspace, apply_together, compute_dtype, orthogonalize

STEPS = {"quintic": range(3, 8), "polar_express": range(3, 8), "tight": range(3, 7)}
BASELINE = ("quintic", 5)
COLORS = {"quintic": "#8a8a8a", "polar_express": "#0072B2", "tight": "#D55E00"}


@dataclass(frozen=True)
class Row:
    """One contender on the matrices of one kind; ``speed`` is relative to the baseline."""

    kind: str
    coefficients: str
    steps: int
    error: float
    largest_error: float
    milliseconds: float
    speed: float
    speed_range: tuple[float, float]


def momentum_of(checkpoints: list[Path]) -> dict[str, list[Tensor]]:
    """Return the momentum buffers of Muon's matrices by their kind, from ``optimizer.pt``."""
    kinds: dict[str, list[Tensor]] = {"square": [], "rectangular": []}
    for folder in checkpoints:
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        for state in saved["state"].values():
            buffer = state.get("exp_avg")
            if buffer is None or buffer.ndim != 2 or "exp_avg_sq" in state:
                continue  # AdamW's half
            kind = "square" if buffer.shape[0] == buffer.shape[1] else "rectangular"
            kinds[kind].append(buffer)
    if not any(kinds.values()):
        raise SystemExit(f"error: no momentum of matrices in {checkpoints}; was it Muon?")
    return {kind: buffers for kind, buffers in kinds.items() if buffers}


def decompose(matrix: Tensor) -> tuple[Tensor, float]:
    """Return the exact polar factor, and the stable rank ‖X‖_F²/σ₁²."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U @ Vh, float(S.square().sum() / S[0].square())


def measure(kind: str, matrices: list[Tensor], dtype: str, repeats: int) -> list[Row]:
    """Return a row per contender."""
    matrices = sorted(matrices, key=lambda matrix: (sorted(matrix.shape), matrix.shape))
    exact = [decompose(matrix)[0] for matrix in matrices]
    # As in a step: rounded first, with matrices of one shape and its transpose in one memory.
    rounded = compute_dtype(dtype, matrices[0].device)
    groups = [list(same) for _, same in groupby(matrices, key=lambda one: sorted(one.shape))]
    given = [
        torch.stack([matrix.reshape(same[0].shape).to(rounded) for matrix in same])
        for same in groups
    ]
    batches, workspace = [torch.empty_like(batch) for batch in given], Workspace()

    def factors(name: str, steps: int) -> Iterator[Tensor]:
        def polar(x: Tensor) -> None:
            orthogonalize(
                x, coefficients=name, steps=steps, dtype=dtype, out=x, workspace=workspace,
                method="newton_schulz" if name == "quintic" else "auto",
            )  # fmt: skip

        for batch, same, values in zip(batches, groups, given, strict=True):
            batch.copy_(values)
            if name == "quintic":  # one by one, as in torch.optim.Muon
                for place, matrix in zip(batch, same, strict=True):
                    polar(place.view(matrix.shape))
            else:
                apply_together(polar, batch, [(m.shape[0], m.shape[1]) for m in same])
        places = zip(chain(*batches), matrices, strict=True)
        return (place.view(matrix.shape) for place, matrix in places)

    keys = [(name, steps) for name, counts in STEPS.items() for steps in counts]
    errors = {
        key: [
            float((found.double() - oracle).norm() / oracle.norm())
            for found, oracle in zip(factors(*key), exact, strict=True)
        ]
        for key in keys
    }
    rounds = take_turns({key: partial(factors, *key) for key in keys}, repeats, "cpu")
    return [row(kind, key, errors[key], rounds, len(matrices)) for key in keys]


def row(
    kind: str,
    key: tuple[str, int],
    errors: list[float],
    rounds: list[dict[tuple[str, int], float]],
    count: int,
) -> Row:
    """Summarize the errors and times of one contender."""
    speeds = [times[BASELINE] / times[key] for times in rounds]
    return Row(
        kind=kind,
        coefficients=key[0],
        steps=key[1],
        error=statistics.fmean(errors),
        largest_error=max(errors),
        milliseconds=1e3 * statistics.median(times[key] for times in rounds) / count,
        speed=statistics.median(speeds),
        speed_range=(min(speeds), max(speeds)),
    )


def table(rows: list[Row], title: str) -> Table:
    """Lay out the rows; those that nothing beats in both time and error are bold."""
    shown = Table("coefficients", "steps", "error", "largest", "ms", "speed", "range", title=title)
    for one in rows:
        beaten = any(o.error < one.error and o.speed > one.speed for o in rows)
        low, high = one.speed_range
        shown.add_row(
            one.coefficients, str(one.steps), f"{one.error:.3f}", f"{one.largest_error:.3f}",
            f"{one.milliseconds:.2f}", f"{one.speed:.2f}", f"{low:.2f} … {high:.2f}",
            style=None if beaten else "bold",
        )  # fmt: skip
    return shown


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Draw error over time, one line per family, relative to the baseline."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(one.kind for one in rows))
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(4.4 * len(kinds), 3.6), dpi=160, squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axes, kind in zip(panels[0], kinds, strict=True):
        for name, color in COLORS.items():
            line = [one for one in rows if (one.kind, one.coefficients) == (kind, name)]
            times, errors = [1 / one.speed for one in line], [one.error for one in line]
            axes.plot(times, errors, "o-", color=color, label=name, markersize=4)
            for one, x, y in zip(line, times, errors, strict=True):
                axes.annotate(str(one.steps), (x, y), (4, 4), textcoords="offset points",
                              fontsize=8, color=color)  # fmt: skip
        axes.set_title(f"{kind} matrices", loc="left", fontsize=10)
        axes.set_xlabel("time / five steps of the quintic")
        axes.set_yscale("log")
        ticks = [0.02, 0.05, 0.1, 0.2, 0.5]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("relative error")
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders with optimizer.pt")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    console = Console(width=100)
    for kind, matrices in momentum_of(arguments.checkpoints).items():
        found = measure(kind, matrices, arguments.dtype, arguments.repeats)
        ranks = [decompose(matrix)[1] for matrix in matrices]
        shapes = ", ".join(sorted({f"{m} × {n}" for m, n in (tuple(x.shape) for x in matrices)}))
        console.print(table(found, f"{len(matrices)} {kind} ({shapes}), {arguments.dtype}"))
        print(f"stable ranks {min(ranks):.1f} … {max(ranks):.1f}, median "
              f"{statistics.median(ranks):.1f}")  # fmt: skip
        rows += found
    if arguments.figure:
        draw(rows, arguments.figure, f"Momentum of a training, {arguments.dtype}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
