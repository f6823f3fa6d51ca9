"""The command line of a study: ``run`` trains what is missing, ``report`` prints and draws.

In: the arms of a recipe and its own options. Out: parsed arguments; Markdown and figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from study import figures
from study.harness import Arm, Plan, Train, named, study
from study.records import Records
from study.tables import Row, cells_of, columns, rows, table, title

PlansOf = Callable[[Mapping[str, Any]], list[Plan]]
"""Returns the plans of the arms in a cell."""
Figure = Callable[[Sequence[Sequence[Row]], Path], None]
"""Draws the rows of all cells into a file."""
Overview = Callable[[Sequence[Sequence[Row]]], list[str]]
"""Returns the lines of a table that compares the cells."""


def parsers(description: str, arms: Sequence[str], budget: int) -> list[argparse.ArgumentParser]:
    """Return the parser of the command line, and those of ``run`` and ``report``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="search each arm, then train fresh seeds")
    reporting = commands.add_parser("report", help="print what stands in the file")
    for command in (running, reporting):
        command.add_argument("--out", type=Path, required=True, help="JSONL file of all trainings")
        command.add_argument("--arms", nargs="+", choices=arms, default=list(arms), metavar="ARM")
        command.add_argument(
            "--budget", type=int, default=budget, help="points that each arm's search may try"
        )
        command.add_argument(
            "--search-seeds", nargs="+", type=int, default=[0], help="of the search, averaged"
        )
    running.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="fresh ones")
    running.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    reporting.add_argument("--figure", type=Path, help="PNG file, numbered if cells are several")
    return [parser, running, reporting]


def check_seeds(arguments: argparse.Namespace) -> None:
    """Stop if the search uses seeds that are reserved for the evaluation."""
    seen = sorted(set(arguments.seeds) & set(arguments.search_seeds))
    if seen:
        listed = ", ".join(map(str, seen))
        raise SystemExit(f"error: --seeds: the search has seen seed {listed}; leave it out.")


def execute(
    arguments: argparse.Namespace,
    arms: Mapping[str, Arm],
    reference: str,
    prepare: Callable[[], tuple[Sequence[Mapping[str, Any]], Train]],
    target: float | None = None,
    figure: Figure | None = None,
    overview: Overview | None = None,
) -> None:
    """Do what the command line says: train what is missing, or print the tables.

    Args:
        arguments: parsed arguments of the command line.
        arms: arms by name, those that the command line names and others.
        reference: the arm that others are compared with.
        prepare: returns the cells and how to train once; it is called before training only.
        target: a loss to reach. Default: none.
        figure: as in :func:`report`.
        overview: as in :func:`report`.
    """

    def plans_of(cell: Mapping[str, Any]) -> list[Plan]:
        fresh, search = getattr(arguments, "seeds", ()), arguments.search_seeds
        budget = arguments.budget
        return [Plan(name, arms[name], cell, fresh, search, budget) for name in arguments.arms]

    if arguments.command == "report":
        print(report(arguments, plans_of, reference, target, figure, overview))
        return
    check_seeds(arguments)
    cells, train = prepare()
    plans = [plan for cell in cells for plan in plans_of(cell)]
    study(Records(arguments.out), plans, train, arguments.jobs)


def report(
    arguments: argparse.Namespace,
    plans_of: PlansOf,
    reference: str,
    target: float | None = None,
    figure: Figure | None = None,
    overview: Overview | None = None,
) -> str:
    """Return the tables of all cells in the file; draw figures if the command line asks for them.

    Args:
        arguments: parsed arguments of the command line.
        plans_of: returns the plans in a cell.
        reference: the arm that others are compared with.
        target: a loss to reach. Default: none.
        figure: draws all cells into one file. Default: one figure per cell.
        overview: compares the cells, in a table at the end. Default: none.
    """
    records = Records(arguments.out)
    found = [rows(records, plans_of(cell)) for cell in cells_of(records)]
    tables = [
        "\n".join([heading(cell), "", *table(cell, reference, columns(reference, target))])
        for cell in found
        if cell
    ]
    if overview is not None and (lines := overview(found)):
        tables.append("\n".join(lines))
    if figure is None:
        draw(arguments.figure, found, reference)
    elif arguments.figure:
        arguments.figure.parent.mkdir(parents=True, exist_ok=True)
        figure(found, arguments.figure)
    return "\n\n".join(tables) if tables else "No training has finished."


def heading(cell: Sequence[Row]) -> str:
    """Return the title of a cell, with the cost of its rows."""
    return title(cell[0].plan.cell, [line for row in cell for line in row.lines])


def draw(path: Path | None, found: Sequence[Sequence[Row]], reference: str) -> None:
    """Draw a figure for each cell; from the second on, file names are numbered."""
    drawn = [cell for cell in found if any(row.losses for row in cell)]
    for number, cell in enumerate(drawn if path else (), 1):
        file = path.with_stem(f"{path.stem}_{number}") if number > 1 else path
        figures.draw(cell, reference, file, named(cell[0].plan.cell))
