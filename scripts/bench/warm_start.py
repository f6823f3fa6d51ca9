"""An experiment: would a preconditioner P help the polar factor, that is, does PX have that of X?

In: checkpoints of consecutive steps of a Trainer that trained with Muon. Out: for each kind of
matrix, how far the *exact* polar factor of PX is from that of X, and the spread of the singular
values that remains for an iteration. No iteration removes the first error. P is the inverse norms
of the rows, or (YYᵀ)^-½ of the step before, whose singular values are damped by δσ₁.

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
    """Yield error and spread σ₁/median without P and with each; float64, wide."""
    exact = polar(now)

    def error_and_spread(X: Tensor) -> tuple[float, float]:
        return float((polar(X) - exact).norm() / exact.norm()), spread_of(X)

    yield error_and_spread(now)
    yield error_and_spread(now / now.norm(dim=1, keepdim=True))
    U, S, _ = torch.linalg.svd(before, full_matrices=False)
    for damping in DAMPINGS:
        yield error_and_spread(U / (S + damping * S[0]) @ U.mT @ now)


def polar(X: Tensor) -> Tensor:
    """The exact polar factor."""
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def spread_of(X: Tensor) -> float:
    """Return the largest singular value divided by the median."""
    values = torch.linalg.svdvals(X)
    return float(values[0] / values.median())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of consecutive steps")
    folders = parser.parse_args().checkpoints
    steps = [momentum_of([folder]) for folder in sorted(folders, key=lambda f: int(f.name[11:]))]
    names = ("no P", "row norms", *(f"δ = {damping}" for damping in DAMPINGS))
    table = Table("matrices", "P", "error", "range", "σ₁/median", title="medians")
    for kind in steps[0]:
        found = [
            list(errors(*(x.double().T if x.shape[0] > x.shape[1] else x.double() for x in two)))
            for before, now in pairwise(steps)
            for two in zip(before[kind], now[kind], strict=True)
        ]
        for name, points in zip(names, zip(*found, strict=True), strict=True):
            off, spreads = zip(*points, strict=True)
            table.add_row(
                kind, name, f"{statistics.median(off):.2f}",
                f"{min(off):.2f} … {max(off):.2f}", f"{statistics.median(spreads):.0f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
