"""Accuracy and cost of the polar factor, as a table.

In: the compute dtypes to try, and whether to add compiled iterations.
Out: one row per shape, spectrum, dtype, method and coefficients: error against the float64 SVD,
range of singular values, time relative to the quintic ``newton_schulz``. Contenders take turns, so
that a busy machine slows all of them; times are medians with quartiles. If bfloat16 is emulated,
one round shows its errors, which do not depend on the hardware.

    python scripts/bench/polar.py --dtype float32 --json polar.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_muon.polar import FAMILIES, compute_dtype, orthogonalize

SHAPES = ((512, 512), (768, 2048), (2048, 768))
SPECTRA = ("gaussian", "1/k")
STEPS = 5
BOUNDS = {("polar_express", 5): 0.14, ("quintic", 5): 0.31, ("tight", 4): 0.46, ("tight", 5): 0.14}
"""Largest error, over these shapes and spectra; four steps of ``tight`` are worst on 1/k."""
GRAM_MARGIN = {"polar_express": 0.03, "quintic": 0.03, "tight": 0.06}
"""Largest difference between the errors of ``gram`` and ``newton_schulz``, by
coefficients."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a polar factor."""

    method: str
    coefficients: str
    compiled: bool = False
    steps: int = STEPS

    def __call__(self, x: Tensor, dtype: str) -> Tensor:
        """Return the polar factor of x (m, n)."""
        return orthogonalize(
            x,
            method=self.method,
            coefficients=self.coefficients,
            steps=self.steps,
            dtype=dtype,
            compile=self.compiled,
        )

    @property
    def label(self) -> str:
        """Return the name of the method for the table."""
        return f"{self.method} (compiled)" if self.compiled else self.method


@dataclass(frozen=True)
class Row:
    """The results of one contender on one matrix."""

    shape: tuple[int, int]
    spectrum: str
    dtype: str
    method: str
    coefficients: str
    steps: int
    error: float
    smallest: float
    largest: float
    relative_time: float
    relative_time_quartiles: tuple[float, float]
    milliseconds: float


BASELINE = Contender("newton_schulz", "quintic")


def contenders(with_compiled: bool) -> list[Contender]:
    """Return the baseline first, then every other combination, then the SVD."""
    named = [(name, STEPS) for name in FAMILIES] + [("tight", STEPS - 1)]
    plain = [Contender(m, c, False, k) for c, k in named for m in ("newton_schulz", "gram")]
    compiled = [replace(contender, compiled=True) for contender in plain] if with_compiled else []
    rest = [c for c in (*plain, *compiled) if c != BASELINE]
    return [BASELINE, *rest, Contender("svd", "polar_express")]


def matrix(shape: tuple[int, int], spectrum: str, device: str) -> tuple[Tensor, Tensor]:
    """Return a matrix (m, n) in float32 and its exact polar factor in float64."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(shape, dtype=torch.float64, generator=generator).to(device)
    U, S, Vh = torch.linalg.svd(gaussian, full_matrices=False)
    if spectrum == "1/k":
        S = 1 / torch.arange(1, len(S) + 1, dtype=S.dtype, device=device)
    return (U * S @ Vh).float(), U @ Vh


def interleaved(
    runs: Sequence[Callable[[], Tensor]], repeats: int, device: str
) -> tuple[list[Tensor], list[list[float]]]:
    """Return each run's result and its seconds, one per round; the runs take turns.

    If there is more than one round, a warmup round comes first.
    """
    warmup = repeats > 1
    times: list[list[float]] = [[] for _ in runs]
    results: list[Tensor] = []
    for _ in range(warmup + repeats):
        results = []
        for run, seconds in zip(runs, times, strict=True):
            start = time.perf_counter()
            results.append(run())
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return results, [seconds[warmup:] for seconds in times]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measure(
    shape: tuple[int, int], spectrum: str, dtype: str, args: argparse.Namespace
) -> list[Row]:
    """Return a row per contender for one matrix and one dtype."""
    x, exact = matrix(shape, spectrum, args.device)
    entrants = contenders(args.compile)
    # The decomposition computes in float32 for any dtype: one row is enough.
    if dtype != "float32":
        entrants = [c for c in entrants if c.method != "svd"]
    # Emulated bfloat16 takes minutes, and its times say nothing about hardware that has it.
    emulated = dtype == "bfloat16" and compute_dtype("auto", x.device) != torch.bfloat16
    runs = [partial(contender, x, dtype) for contender in entrants]
    factors, times = interleaved(runs, 1 if emulated else args.repeats, args.device)
    rows = []
    for contender, result, seconds in zip(entrants, factors, times, strict=True):
        factor = result.double()
        values = torch.linalg.svdvals(factor)
        # Relative to the baseline of the same round, which had the same load.
        low, middle, high = quartiles([t / t0 for t, t0 in zip(seconds, times[0], strict=True)])
        rows.append(
            Row(
                shape=shape,
                spectrum=spectrum,
                dtype=f"{dtype} (emulated)" if emulated else dtype,
                method=contender.label,
                coefficients="" if contender.method == "svd" else contender.coefficients,
                steps=contender.steps,
                error=float((factor - exact).norm() / exact.norm()),
                smallest=float(values[-1]),
                largest=float(values[0]),
                relative_time=middle,
                relative_time_quartiles=(low, high),
                milliseconds=1e3 * statistics.median(seconds),
            )
        )
    return rows


def misses(rows: list[Row]) -> list[str]:
    """Name the rows whose error is above its bound."""
    direct = {
        (r.shape, r.spectrum, r.dtype, r.coefficients, r.steps): r.error
        for r in rows
        if r.method == "newton_schulz"
    }
    found = []
    for r in rows:
        if (r.coefficients, r.steps) not in BOUNDS:
            continue
        apart = abs(r.error - direct[r.shape, r.spectrum, r.dtype, r.coefficients, r.steps])
        if r.error > BOUNDS[r.coefficients, r.steps] or apart > GRAM_MARGIN[r.coefficients]:
            found.append(
                f"{r.shape} {r.spectrum} {r.dtype} {r.method} {r.coefficients}: {r.error:.3f}"
            )
    return found


def as_table(rows: list[Row]) -> Table:
    """Lay out the rows, with a line between matrices."""
    table = Table(title="Polar factor")
    for heading in ("shape", "spectrum", "dtype", "method", "coefficients", "steps"):
        table.add_column(heading)
    for heading in ("error", "singular values", "time / quintic", "quartiles", "ms"):
        table.add_column(heading, justify="right")
    previous = None
    for r in rows:
        if previous not in (None, (r.shape, r.spectrum, r.dtype)):
            table.add_section()
        previous = (r.shape, r.spectrum, r.dtype)
        low, high = r.relative_time_quartiles
        table.add_row(
            f"{r.shape[0]}×{r.shape[1]}",
            r.spectrum,
            r.dtype,
            r.method,
            r.coefficients,
            "" if r.method == "svd" else str(r.steps),
            f"{r.error:.4f}",
            f"{r.smallest:.3f} to {r.largest:.3f}",
            f"{r.relative_time:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{r.milliseconds:.1f}",
        )
    return table


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Accuracy and cost of the polar factor, as a table."
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=("bfloat16", "float32"),
        help="compute dtype, may be repeated (default: both)",
    )
    parser.add_argument("--compile", action="store_true", help="add the compiled iterations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    args.dtype = args.dtype or ["float32", "bfloat16"]
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least one round is needed.")
    return args


def main() -> int:
    """Measure, print, and fail if an error is above its bound."""
    args = parse()
    torch.set_num_threads(args.threads)
    rows = [
        row
        for dtype in args.dtype
        for shape in SHAPES
        for spectrum in SPECTRA
        for row in measure(shape, spectrum, dtype, args)
    ]
    console = Console(width=None if Console().is_terminal else 160)
    console.print(as_table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    above = misses(rows)
    for line in above:
        console.print(f"above its bound: {line}", style="red")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
