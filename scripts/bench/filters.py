"""Which filter, map and rescaling trains best when gradients are noisy: a study that resumes.

In: names of arms and cells. Out: a JSONL file with a line for each finished training, and a
Markdown table of it. Each arm has its own learning rate of the matrices, found on seed 0 on a grid
of factor 2 until both neighbors of the best are worse. The table reports seeds that the search has
not seen, paired with those of the default. A training that is in the file is not repeated, so the
study may be stopped at any time, and the same command continues it.

    python scripts/bench/filters.py run --out runs/filters.jsonl --jobs 2
    python scripts/bench/filters.py run --out runs/filters.jsonl --noise heavy --arms default clip
    python scripts/bench/filters.py report --out runs/filters.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "recipes"))  # for recipes/study

from filter_report import report
from study import command
from study.byte_llama import sizes, train
from study.harness import Arm, Plan, study
from study.records import Records
from study.tables import rows

from hf_muon import MuonConfig


class Share(float):
    """A share of the run, instead of a number of steps."""


def muon(start: float = 2e-3, **settings: Any) -> Arm:
    """Return an arm of Muon: fields of ``MuonConfig``, and the starting rate of its search."""
    kept = {"optimizer": "muon", "coefficients": "polar_express"}  # as in docs/filters.md
    return Arm({**kept, **settings}, {"rate": start}, {"rate": 2.0})


TWO = {"momentum": (0.9, 0.98), "momentum_weights": (0.44, 0.56), "nesterov": False}
FOUR = {"momentum": (0.8, 0.9, 0.95, 0.98), "momentum_weights": (0.25,) * 4, "nesterov": False}
FALLING = {
    "momentum": 0.98,
    "momentum_end": 0.85,
    "momentum_cooldown_start": Share(1 / 3),
    "momentum_cooldown_steps": Share(2 / 3),
    "momentum_schedule": "linear",
}

REFERENCE = "default"
ARMS = {
    # filters
    REFERENCE: muon(),  # EMA of 0.95, Nesterov
    "plain": muon(nesterov=False),
    "ema_0.8": muon(momentum=0.8),
    "ema_0.9": muon(momentum=0.9),
    "ema_0.98": muon(momentum=0.98),
    "two_terms": muon(**TWO),
    "two_terms_nesterov": muon(**{**TWO, "nesterov": True}),
    "four_terms": muon(**FOUR),
    "four_terms_nesterov": muon(**{**FOUR, "nesterov": True}),
    "falling": muon(**FALLING),
    "auto": muon(momentum="auto"),
    "clip": muon(prefilter="clip"),
    "norm": muon(prefilter="norm"),
    "int8": muon(momentum_dtype="int8"),
    # maps
    "polargrad": muon(matrix_map="polargrad"),
    "soft_0.25": muon(4e-3, matrix_map="soft", map_power=0.25),
    "soft_0.5": muon(8e-3, matrix_map="soft", map_power=0.5),
    # rescalings and the write
    "normuon": muon(rescale="rows"),
    "adamuon": muon(rescale="entries"),
    "hyperball": muon(8e-3, step_rule="hyperball"),
    # orders
    "post_polar": muon(3.2e-2, order="post_polar", nesterov=False),
    "polar_only": muon(1.6e-2, order="polar_only"),
    "beta_0": muon(1.6e-2, momentum=0.0),  # the same as polar_only, computed as pre_polar
    # controls
    "adamw": Arm({"optimizer": "adamw"}, {"rate": 1e-3}, {"rate": 2.0}),
    "untrained": muon(0.0),  # the matrices keep their initial values
}

CELLS = ("128x2048", "128x512")
"""Tokens of a step x steps: the default ones, of which one is the second horizon."""

ADAMW_RATE = 8e-3
MOST_RATES = 14
"""Rates that the search of an arm may try."""
NO_NOISE = "none"
NOISES = (NO_NOISE, "heavy", "spike")


def resolved(arm: Arm, steps: int) -> Arm:
    """Return an arm for runs of a given number of steps.

    Raises:
        ValueError: this version of the package does not have one of the settings.
    """
    settings = {
        name: round(value * steps) if isinstance(value, Share) else value
        for name, value in arm.settings.items()
    }
    checked = {name: value for name, value in settings.items() if name != "optimizer"}
    MuonConfig(lr=arm.start["rate"], **checked)
    return Arm(settings, arm.start, arm.axes)


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what all arms have in common, for each cell."""
    scale = arguments.noise_scale if arguments.noise == "heavy" else 0.0
    return [
        {
            "tokens": tokens,
            "steps": steps,
            "adamw_rate": arguments.adamw_rate,
            "noise": arguments.noise,
            "noise_scale": scale,
            "corpus": arguments.corpus,
        }
        for tokens, steps in map(sizes, arguments.cells)
    ]


def plans_in(cell: Mapping[str, Any], arguments: argparse.Namespace) -> list[Plan]:
    """Return the plans of the arms in a cell, after checking the settings of all of them."""
    fresh, search = getattr(arguments, "seeds", ()), arguments.search_seeds
    return [
        Plan(name, resolved(ARMS[name], cell["steps"]), cell, fresh, search, arguments.budget)
        for name in arguments.arms
    ]


def is_asked_for(cell: Mapping[str, Any], arguments: argparse.Namespace) -> bool:
    """Return whether to report a cell: the requested ones, without noise and with the given one."""
    wanted = set(map(sizes, arguments.cells)) if arguments.cells else None
    noises = {NO_NOISE, arguments.noise} if arguments.noise else set(NOISES)
    is_wanted = wanted is None or (cell["tokens"], cell["steps"]) in wanted
    return is_wanted and cell["noise"] in noises


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser, running, reporting = command.parsers(__doc__.splitlines()[0], list(ARMS), MOST_RATES)
    running.add_argument("--cells", nargs="+", default=CELLS, help="tokens of a step x steps")
    running.add_argument("--noise", choices=NOISES, default=NO_NOISE, help="of the gradients")
    running.add_argument("--noise-scale", type=float, default=1.0, help="of heavy, in gradients")
    running.add_argument("--adamw-rate", type=float, default=ADAMW_RATE, help="of all but matrices")
    running.add_argument("--corpus", default="shakespeare+sotu", help="as the recipes name them")
    reporting.add_argument("--cells", nargs="+", help="all by default")
    reporting.add_argument("--noise", choices=NOISES, help="beside the clean runs; all by default")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, or print the tables."""
    arguments = parsed(argv)
    records = Records(arguments.out)
    if arguments.command == "report":
        wanted = [cell for cell in command.cells_of(records) if is_asked_for(cell, arguments)]
        found = [rows(records, plans_in(cell, arguments)) for cell in wanted]
        print(report(found, REFERENCE))
        command.draw(arguments.figure, found, REFERENCE)
        return
    command.check_seeds(arguments)
    plans = [plan for cell in cells(arguments) for plan in plans_in(cell, arguments)]
    study(records, plans, train, arguments.jobs)


if __name__ == "__main__":
    main()
