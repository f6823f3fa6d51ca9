"""Which filter, map and rescaling trains best where gradients are noisy: a study that resumes.

In: names of arms and cells. Out: a JSONL file with a line for each training that has finished, and
a Markdown table of it. Each arm has its own learning rate of the matrices, found on seed 0 on a
grid of factor 2 until both neighbours of the best are worse; what is reported are seeds that the
search has not seen, paired with those of the default. A training that stands in the file is not
repeated, so that the study may be stopped at any time, and goes on with the same command.

    python scripts/bench/filters.py run --out runs/filters.jsonl --jobs 2
    python scripts/bench/filters.py run --out runs/filters.jsonl --noise heavy --arms default clip
    python scripts/bench/filters.py report --out runs/filters.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byte_llama import LENGTH, Run
from filter_report import report
from filter_search import SEARCH_SEED, Line, Plan, Runs, read, study

from hf_muon import MuonConfig


class Share(float):
    """A share of the run, in place of a number of steps."""


@dataclass(frozen=True)
class Arm:
    """Settings that compete, fields of ``MuonConfig``, and the rate at which the search begins.

    ``settings=None`` trains the matrices by AdamW.
    """

    settings: Mapping[str, Any] | None
    start: float = 2e-3


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
    REFERENCE: Arm({}),  # EMA of 0.95, Nesterov
    "plain": Arm({"nesterov": False}),
    "ema_0.8": Arm({"momentum": 0.8}),
    "ema_0.9": Arm({"momentum": 0.9}),
    "ema_0.98": Arm({"momentum": 0.98}),
    "two_terms": Arm(TWO),
    "two_terms_nesterov": Arm({**TWO, "nesterov": True}),
    "four_terms": Arm(FOUR),
    "four_terms_nesterov": Arm({**FOUR, "nesterov": True}),
    "falling": Arm(FALLING),
    "auto": Arm({"momentum": "auto"}),
    "clip": Arm({"prefilter": "clip"}),
    "norm": Arm({"prefilter": "norm"}),
    "int8": Arm({"momentum_dtype": "int8"}),
    # maps
    "polargrad": Arm({"matrix_map": "polargrad"}),
    "soft_0.25": Arm({"matrix_map": "soft", "map_power": 0.25}, 4e-3),
    "soft_0.5": Arm({"matrix_map": "soft", "map_power": 0.5}, 8e-3),
    # rescalings and the write
    "normuon": Arm({"rescale": "rows"}),
    "adamuon": Arm({"rescale": "entries"}),
    "hyperball": Arm({"step_rule": "hyperball"}, 8e-3),
    # orders
    "post_polar": Arm({"order": "post_polar", "nesterov": False}, 3.2e-2),
    "polar_only": Arm({"order": "polar_only"}, 1.6e-2),
    "beta_0": Arm({"momentum": 0.0}, 1.6e-2),  # what polar_only is, computed as pre_polar
    # controls
    "adamw": Arm(None, 1e-3),
    "untrained": Arm({}, 0.0),  # the matrices stay as they began
}

CELLS = ("128x2048", "128x512")
"""Tokens of a step x steps: the default ones, of which one is the second horizon."""

ADAMW_RATE = 8e-3
NOISES = ("none", "heavy", "spike")


def resolved(arm: Arm, steps: int) -> dict[str, Any] | None:
    """Return the settings of a run of so many steps.

    Raises:
        ValueError: this version of the package has no such setting.
    """
    if arm.settings is None:
        return None
    settings: dict[str, Any] = {
        name: round(value * steps) if isinstance(value, Share) else value
        for name, value in arm.settings.items()
    }
    MuonConfig(lr=arm.start, **settings)
    return settings


def cell(name: str) -> tuple[int, int]:
    """Return the tokens of a step and the steps of a cell such as ``128x512``."""
    tokens, _, steps = name.partition("x")
    try:
        found = int(tokens), int(steps)
    except ValueError:
        raise SystemExit(
            f"error: --cells {name}: tokens x steps are expected, as 128x512."
        ) from None
    if found[0] % LENGTH or min(found) < 1:
        raise SystemExit(f"error: --cells {name}: tokens come in multiples of {LENGTH}.")
    return found


def plans(arguments: argparse.Namespace) -> list[Plan]:
    """Return what the command line asks for, after a check of the settings of all arms."""
    scale = arguments.noise_scale if arguments.noise == "heavy" else 0.0
    found = []
    for tokens, steps in map(cell, arguments.cells):
        for name in arguments.arms:
            arm = ARMS[name]
            run = Run(
                settings=resolved(arm, steps),
                tokens=tokens,
                steps=steps,
                rate=arm.start,
                adamw_rate=arguments.adamw_rate,
                seed=SEARCH_SEED,
                noise=arguments.noise,
                noise_scale=scale,
                corpus=arguments.corpus,
            )
            found.append(Plan(name, run, arm.start, arguments.seeds))
    return found


def chosen(lines: Iterable[Line], arguments: argparse.Namespace) -> list[Line]:
    """Return the lines of the cells, and of the noise besides the clean runs, to report."""
    cells = set(map(cell, arguments.cells)) if arguments.cells else None
    noises = {"none", arguments.noise} if arguments.noise else set(NOISES)
    return [
        line
        for line in lines
        if line["noise"] in noises and (not cells or (line["tokens"], line["steps"]) in cells)
    ]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="search rates, then train fresh seeds")
    reporting = commands.add_parser("report", help="print what stands in the file")
    for command in (running, reporting):
        command.add_argument("--out", type=Path, required=True, help="JSONL file of all trainings")
        command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    running.add_argument("--cells", nargs="+", default=CELLS, help="tokens of a step x steps")
    running.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="fresh ones")
    running.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    running.add_argument("--noise", choices=NOISES, default="none", help="of the gradients")
    running.add_argument("--noise-scale", type=float, default=1.0, help="of heavy, in gradients")
    running.add_argument("--adamw-rate", type=float, default=ADAMW_RATE, help="of all but matrices")
    running.add_argument("--corpus", default="shakespeare+sotu", help="as the recipes name them")
    reporting.add_argument("--cells", nargs="+", help="all by default")
    reporting.add_argument("--noise", choices=NOISES, help="beside the clean runs; all by default")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, or print the tables."""
    arguments = parsed(argv)
    if arguments.command == "report":
        print(report(chosen(read(arguments.out), arguments), arguments.arms, REFERENCE))
        return
    if SEARCH_SEED in arguments.seeds:
        raise SystemExit(f"error: --seeds: the search has seen seed {SEARCH_SEED}; leave it out.")
    study(Runs(arguments.out), plans(arguments), arguments.jobs)


if __name__ == "__main__":
    main()
