"""Rerun the experiments on orders, filters and spectra: one command each.

In: ``python run.py EXPERIMENT [--quick] [--jobs 2] [--out FOLDER]``, or ``all``. Out: in the
folder, ``EXPERIMENT.json``, ``EXPERIMENT.png``, and the parts of the experiment, from which a later
call continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import ablations
import angles
import arch
import digits
import orders
import pretraining
import sensing
import spectra
from parts import Parts, prepare_process, processes
from shared.arguments import RecipeError

EXPERIMENTS: dict[str, ModuleType] = {
    "pretraining": pretraining,
    "digits": digits,
    "angles": angles,
    "ablations": ablations,
    "orders": orders,
    "arch": arch,
    "sensing": sensing,
    "spectra": spectra,
}
"""Longest first, so that ``all`` is interrupted with the least to lose at its end."""


def main(argv: list[str]) -> None:
    """Run the requested experiments, one after the other."""
    arguments = command_line(argv)
    prepare_process()
    names = list(EXPERIMENTS) if arguments.experiment == "all" else [arguments.experiment]
    out = arguments.out or Path("runs/ordering") / ("quick" if arguments.quick else "full")
    pool = processes(arguments.jobs) if arguments.jobs > 1 else contextlib.nullcontext()
    with pool as workers:
        for name in names:
            run_experiment(name, Parts(out / name, workers), out, arguments.quick)


def command_line(argv: list[str]) -> argparse.Namespace:
    """Return the parsed arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--quick", action="store_true", help="minutes instead of an hour")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, help="default: runs/ordering/full, or …/quick")
    return parser.parse_args(argv)


def run_experiment(name: str, parts: Parts, out: Path, quick: bool) -> None:
    """Compute what is missing, write JSON and figure, and print the results."""
    started = time.perf_counter()
    print(f"{name}", flush=True)
    experiment = EXPERIMENTS[name]
    results = experiment.run(parts, quick)
    command = f"python run.py {name}{' --quick' if quick else ''}"
    content = {"command": command, "process_seconds": round(parts.seconds()), **results}
    text = json.dumps(strict(content), indent=1, allow_nan=False)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf8")
    experiment.draw(results, out / f"{name}.png")
    for line in experiment.lines(results):
        print(f"  {line}")
    print(f"  {time.perf_counter() - started:.0f} s; {out / name}.json, .png", flush=True)


def strict(value: Any) -> Any:
    """Return a value with null for numbers that JSON does not have, as losses of diverged runs."""
    if isinstance(value, dict):
        return {key: strict(inside) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
