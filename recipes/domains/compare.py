"""Muon and AdamW beyond language: images, speech, recommendation.

In: ``python compare.py run --out FILE.jsonl [--domains mnist vowels …] [--arms ARM …]``. Out: the
file, with a line for each training; with ``report``, a table for each domain and a figure. A
stopped study continues with the same command.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared and recipes/study

from shared.arguments import RecipeError
from study import command
from study.harness import Arm, Plan, study
from study.records import Records
from study.tables import Column, Row, columns, rows, table
from training import DOMAINS, domain_of, train

AXES = {"rate": 2.0, "other_rate": 2.0, "weight_decay": (0.0, 0.1, 0.3, 1.0)}
REFERENCE = "adamw"


def arm(rate: float, **settings: Any) -> Arm:
    """Return an arm whose search begins at this rate of the matrices; the rest begins alike."""
    start = {"rate": rate, "other_rate": 2e-3, "weight_decay": 0.1}
    return Arm(settings, start, AXES)


ARMS = {
    REFERENCE: arm(1e-3, optimizer="adamw"),
    "muon": arm(4e-3, optimizer="muon"),
    "post_polar": arm(3.2e-2, optimizer="muon", order="post_polar"),
    "polar_only": arm(1.6e-2, optimizer="muon", order="polar_only"),
    "normuon": arm(4e-3, optimizer="muon", rescale="rows"),
    # The control: matrices stay at their initial values.
    "untrained": Arm(
        {"optimizer": "muon"}, {"rate": 0.0, "other_rate": 2e-3, "weight_decay": 0.0}, AXES
    ),
}
BUDGET = 16
"""Points that the search of an arm may try."""
QUICK_STEPS, QUICK_BUDGET = 2, 1


def counted(name: str) -> Column:
    """Return a column with the mean of a metric over the fresh seeds."""

    def text(row: Row, base: Row | None) -> str:
        at_best = row.plan.run(row.best, 0).point
        lines = [one for one in row.lines if one["point"] == at_best]
        values = [one["found"].get(name) for one in lines if one["seed"] in row.losses]
        known = [value for value in values if value is not None]
        return f"{100 * statistics.fmean(known):.2f} %" if known else "–"

    return name, text


def report(arguments: argparse.Namespace) -> str:
    """Return a table for each domain, and draw the figures."""
    records = Records(arguments.out)
    cells = [cell for cell in command.cells_of(records) if cell["domain"] in arguments.domains]
    found = [rows(records, plans_in(cell, arguments)) for cell in cells]
    command.draw(arguments.figure, found, REFERENCE)
    parts = []
    for cell in filter(None, found):
        shown = columns(REFERENCE)
        metrics = domain_of(cell[0].plan.cell["domain"]).metrics
        shown[5:5] = [counted(name) for name in metrics]
        parts.append("\n".join([command.heading(cell), "", *table(cell, REFERENCE, shown)]))
    return "\n\n".join(parts) or "No training has finished."


def plans_in(cell: Mapping[str, Any], arguments: argparse.Namespace) -> list[Plan]:
    """Return the plans of the arms in a domain."""
    fresh, search = getattr(arguments, "seeds", ()), arguments.search_seeds
    return [
        Plan(name, ARMS[name], cell, fresh, search, arguments.budget) for name in arguments.arms
    ]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser, running, reporting = command.parsers(__doc__, list(ARMS), BUDGET)
    for one in (running, reporting):
        one.add_argument(
            "--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), metavar="DOMAIN"
        )
    running.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, or print the tables."""
    arguments = parsed(argv)
    if arguments.command == "report":
        print(report(arguments))
        return
    command.check_seeds(arguments)
    if arguments.quick:
        arguments.budget = QUICK_BUDGET
    cells = [
        {"domain": name, "steps": QUICK_STEPS if arguments.quick else domain_of(name).steps}
        for name in arguments.domains
    ]
    plans = [plan for cell in cells for plan in plans_in(cell, arguments)]
    study(Records(arguments.out), plans, train, arguments.jobs)


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
