"""Would the last step's inverse square root help this step's polar factor? An experiment.

In: checkpoints of consecutive steps of a Trainer that trained with Muon. Out: for each kind of
matrices and some dampings δ, how far the *exact* polar factor of PX is from that of X, with
P = (YYᵀ)^-½ of the step before, its singular values damped by δσ₁; and the spread of the singular
values that an iteration would have left to do. The first is an error that no iteration removes.

    python scripts/bench/warm_start.py runs/momentum/checkpoint-*
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from pareto import momentum_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

DAMPINGS = (0.0, 0.01, 0.1)


def errors(before: Tensor, now: Tensor) -> Iterator[tuple[float, float]]:
    """Yield error and spread σ₁/median without P, then for every damping; float64, wide."""
    exact, spread = polar(now), spread_of(now)
    yield 0.0, spread
    U, S, _ = torch.linalg.svd(before, full_matrices=False)
    for damping in DAMPINGS:
        P = U / (S + damping * S[0]) @ U.mT
        yield float((polar(P @ now) - exact).norm() / exact.norm()), spread_of(P @ now)


def polar(X: Tensor) -> Tensor:
    """The exact polar factor."""
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def spread_of(X: Tensor) -> float:
    """The largest singular value over their median."""
    values = torch.linalg.svdvals(X)
    return float(values[0] / values.median())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of consecutive steps")
    folders = parser.parse_args().checkpoints
    steps = [momentum_of([folder]) for folder in sorted(folders, key=lambda f: int(f.name[11:]))]
    table = Table("matrices", "damping", "error", "range", "σ₁/median", title="medians")
    for kind in steps[0]:
        found = [
            list(errors(*(x.double().T if x.shape[0] > x.shape[1] else x.double() for x in two)))
            for before, now in pairwise(steps)
            for two in zip(before[kind], now[kind], strict=True)
        ]
        for damping, points in zip(("no P", *DAMPINGS), zip(*found, strict=True), strict=True):
            off, spreads = zip(*points, strict=True)
            table.add_row(
                kind, str(damping), f"{statistics.median(off):.2f}",
                f"{min(off):.2f} … {max(off):.2f}", f"{statistics.median(spreads):.0f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
