"""The tables of the study of filters.

In: rows. Out: Markdown: a table for each size of run, with a row for each arm and, if gradients
were disturbed, for each kind of noise, with what the noise costs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from study.paired import difference
from study.tables import (
    Row,
    cells,
    compared,
    cost,
    difference_text,
    error_text,
    loss_text,
    verdict_text,
)

CLEAN = ("none", 0.0)
Noise = tuple[str, float]


def report(cells: Iterable[Sequence[Row]], reference: str) -> str:
    """Return a table for each size of run, from the rows of all cells."""
    by_size: dict[str, list[Row]] = {}
    for row in chain.from_iterable(cells):
        by_size.setdefault(json.dumps(size_of(row.plan.cell)), []).append(row)
    parts = [
        "\n".join([title(found), "", *table(found, reference)])
        for _, found in sorted(by_size.items(), key=lambda entry: json.loads(entry[0]))
    ]
    return "\n\n".join(parts) if parts else "No training has finished."


def size_of(cell: Mapping[str, Any]) -> list[Any]:
    """Return what the rows of a table have in common."""
    return [cell[name] for name in ("tokens", "steps", "adamw_rate", "corpus")]


def noise_of(row: Row) -> Noise:
    """Return the kind and the scale of the noise of a row."""
    return row.plan.cell["noise"], row.plan.cell["noise_scale"]


def title(found: Sequence[Row]) -> str:
    """Return the heading of a table, with its cost."""
    tokens, steps, adamw_rate, corpus = size_of(found[0].plan.cell)
    return (
        f"**{tokens} tokens × {steps} steps** of {corpus}; embeddings, head and norms by AdamW at "
        f"{adamw_rate:g}; {cost(line for row in found for line in row.lines)}"
    )


def table(found: Sequence[Row], reference: str) -> list[str]:
    """Return the lines of a table, clean runs first; columns for noise only if there is any."""
    by_name = {(row.plan.name, noise_of(row)): row for row in found}
    is_noisy = any(noise_of(row) != CLEAN for row in found)
    head = ["arm", "best rate", "held-out loss", "standard error", f"against {reference}", "",
            "state B/parameter", "noise to signal", "CPU-s a run"]  # fmt: skip
    head[1:1] = ["noise"] if is_noisy else []
    head += ["what the noise costs"] if is_noisy else []
    lines = [cells(head), cells(["---"] * len(head))]
    for row in sorted(found, key=lambda row: (noise_of(row) != CLEAN, noise_of(row))):
        base, clean = by_name.get((reference, noise_of(row))), by_name.get((row.plan.name, CLEAN))
        texts = [
            row.plan.name,
            rate_text(row),
            loss_text(row.losses),
            error_text(row.losses),
            difference_text(compared(row, base)),
            verdict_text(row, base),
            f"{row.lines[-1]['found']['state_bytes']:.2f}",
            nsr_text(row),
            f"{row.seconds:.1f}",
        ]
        texts[1:1] = [noise_text(noise_of(row))] if is_noisy else []
        texts += [cost_text(row, clean)] if is_noisy else []
        lines.append(cells(texts))
    return lines


def rate_text(row: Row) -> str:
    """Return the best rate, how many were tried, and whether its neighbors were all tried."""
    (rate,) = row.best
    return f"{rate:g} (of {len(row.searched)}{'' if row.is_settled else ', at the edge'})"


def noise_text(noise: Noise) -> str:
    """Return the kind of noise, and its scale if it has one."""
    kind, scale = noise
    return f"{kind} × {scale:g}" if scale else kind


def cost_text(row: Row, clean: Row | None) -> str:
    """Return how much worse an arm is than without noise."""
    if clean is None or row is clean:
        return "–"
    found = difference(row.losses, clean.losses)
    return difference_text(None if found is None or found.error is None else found)


def nsr_text(row: Row) -> str:
    """Return noise to signal over the course of the search's run at the best rate."""
    at_best = [line for line in row.lines if [*line["point"].values()] == [*row.best]]
    values = at_best[0]["found"]["nsr"].values() if at_best else ()
    return " / ".join("–" if value is None else f"{value:.3g}" for value in values)
