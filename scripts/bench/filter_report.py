"""The tables of the study of filters.

In: lines of finished trainings. Out: Markdown: for each cell a row for each arm with its best rate,
mean and standard deviation over the seeds that the search has not seen, the paired difference to
the reference with its standard error, and whether that is more than two of them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from filter_search import SEARCH_SEED, Line, best_rate, next_rates

CLEAN = ("none", 0.0)
FEWEST = 3
"""Seeds below which a difference says nothing: the error of two pairs is too uncertain."""
Noise = tuple[str, float]


@dataclass
class Row:
    """An arm under one kind of noise: losses of the search by rate, then those by seed."""

    arm: str
    noise: Noise
    settings: str
    search: dict[float, float] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The best rate of the search so far."""
        return best_rate(self.search)

    @property
    def losses(self) -> dict[int, float]:
        """Losses of the fresh seeds at the best rate."""
        fresh = (line for line in self.lines if line["seed"] != SEARCH_SEED)
        return {line["seed"]: loss_of(line) for line in fresh if line["rate"] == self.rate}

    @property
    def is_bracketed(self) -> bool:
        """Whether both neighbours of the best rate are worse."""
        return not next_rates(self.search, self.rate)


def loss_of(line: Line) -> float:
    """Return a loss as a number; that of a run that diverged is infinite."""
    return math.inf if line["loss"] is None else float(line["loss"])


def report(lines: Iterable[Line], arms: Sequence[str], reference: str) -> str:
    """Return the tables of all cells in the lines, arms in the given order."""
    cells: dict[tuple[object, ...], list[Line]] = {}
    for line in lines:
        cell = (line["tokens"], line["steps"], line["adamw_rate"], line["corpus"])
        cells.setdefault(cell, []).append(line)
    parts = [
        "\n".join([title(cell, of), "", *table(rows(of, arms), reference)])
        for cell, of in sorted(cells.items())
    ]
    return "\n\n".join(parts) if parts else "No training has finished."


def title(cell: tuple[object, ...], lines: Sequence[Line]) -> str:
    """Return the heading of a cell, with what it has cost."""
    tokens, steps, adamw_rate, corpus = cell
    hours = sum(line["seconds"] for line in lines) / 3600
    return (
        f"**{tokens} tokens × {steps} steps** of {corpus}; embeddings, head and norms by AdamW at "
        f"{adamw_rate:g}; {len(lines)} trainings, {hours:.2f} CPU-hours"
    )


def rows(lines: Iterable[Line], arms: Sequence[str]) -> list[Row]:
    """Return the rows of a cell; where settings of an arm have changed, the last ones count."""
    found: dict[tuple[str, Noise], Row] = {}
    for line in lines:
        noise, settings = noise_of(line), json.dumps(line["settings"], sort_keys=True)
        name = line["arm"], noise
        if name not in found or found[name].settings != settings:
            found[name] = Row(*name, settings)
        found[name].lines.append(line)
        if line["seed"] == SEARCH_SEED:
            found[name].search[line["rate"]] = loss_of(line)
    place = {arm: number for number, arm in enumerate(arms)}
    known = [row for row in found.values() if row.arm in place and row.search]
    return sorted(known, key=lambda row: (row.noise != CLEAN, row.noise, place[row.arm]))


def noise_of(line: Line) -> Noise:
    """Return the kind and the scale of the noise of a line."""
    return line["noise"], line["noise_scale"]


def table(found: Sequence[Row], reference: str) -> list[str]:
    """Return the lines of a table; a column for noise only where there is some."""
    by_name = {(row.arm, row.noise): row for row in found}
    is_noisy = any(row.noise != CLEAN for row in found)
    head = ["arm", "best rate", "held-out loss", f"against {reference}", "", "state B/parameter",
            "noise to signal", "CPU-s a run"]  # fmt: skip
    head[1:1] = ["noise"] if is_noisy else []
    head += ["what the noise costs"] if is_noisy else []
    lines = [cells(head), cells(["---"] * len(head))]
    for row in found:
        base, clean = by_name.get((reference, row.noise)), by_name.get((row.arm, CLEAN))
        texts = [row.arm, rate_text(row), loss_text(row.losses), *compared(row, base)]
        texts += [f"{row.lines[-1]['state_bytes']:.2f}", nsr_text(row), seconds_text(row)]
        texts[1:1] = [noise_text(row.noise)] if is_noisy else []
        texts += [cost_text(row, clean)] if is_noisy else []
        lines.append(cells(texts))
    return lines


def cells(texts: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(texts)} |"


def rate_text(row: Row) -> str:
    """Return the best rate; how many were tried; whether none beside it is left to try."""
    end = "" if row.is_bracketed else ", at the edge"
    return f"{row.rate:g} (of {len(row.search)}{end})"


def noise_text(noise: Noise) -> str:
    """Return the kind of noise, and its scale where it has one."""
    kind, scale = noise
    return f"{kind} × {scale:g}" if scale else kind


def loss_text(losses: Mapping[int, float]) -> str:
    """Return mean ± standard deviation (number of seeds)."""
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if len(finite) < len(losses):
        return f"{len(losses) - len(finite)} of {len(losses)} diverge"
    if not finite:
        return "–"
    spread = f" ± {statistics.stdev(finite):.4f}" if len(finite) > 1 else ""
    return f"{statistics.fmean(finite):.4f}{spread} ({len(finite)})"


def paired(losses: Mapping[int, float], others: Mapping[int, float]) -> tuple[float, float] | None:
    """Return the mean of the differences by seed and its standard error; None below two seeds."""
    both = sorted(losses.keys() & others.keys())
    differences = [losses[seed] - others[seed] for seed in both]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(both))


def compared(row: Row, base: Row | None) -> tuple[str, str]:
    """Return the paired difference ± its standard error, and what it says."""
    if base is None or row is base:
        return "–", ""
    found = paired(row.losses, base.losses)
    if found is None:
        return "–", "no pairs"
    pairs = len(row.losses.keys() & base.losses.keys())
    says = verdict(*found) if pairs >= FEWEST else f"fewer than {FEWEST} pairs"
    return f"{found[0]:+.4f} ± {found[1]:.4f}", says


def verdict(difference: float, error: float) -> str:
    """Return what a difference says; a lower loss is better."""
    if abs(difference) <= 2 * error:
        return "not told apart"
    return "better" if difference < 0 else "worse"


def cost_text(row: Row, clean: Row | None) -> str:
    """Return by how much an arm is worse than itself without noise."""
    found = None if clean is None or row is clean else paired(row.losses, clean.losses)
    return "–" if found is None else f"{found[0]:+.4f} ± {found[1]:.4f}"


def nsr_text(row: Row) -> str:
    """Return noise to signal along the run of the search at the best rate."""
    at_best = [line for line in row.lines if line["rate"] == row.rate]
    values = at_best[0]["nsr"].values() if at_best else ()
    return " / ".join("–" if value is None else f"{value:.3g}" for value in values)


def seconds_text(row: Row) -> str:
    """Return the median CPU-seconds of a run."""
    return f"{statistics.median(line['seconds'] for line in row.lines):.1f}"
