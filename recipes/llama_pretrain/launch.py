"""Training runs in processes of their own.

In: a configuration, overrides and an output folder for each run. Out: their ``results.json``. A run
that already has one is skipped, so that an interrupted search continues where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from shared.arguments import RecipeError

SCRIPT = Path(__file__).with_name("run.py")
EVERY = 9.0  # seconds between lines if there is no bar
DIVERGED = 3  # run.py's exit status when a gradient was not finite


@dataclass(frozen=True)
class Run:
    """One training run: ``run.py config --name value ... --output_dir folder``.

    Raises:
        RecipeError: ``extra``, which all runs share, sets one of the run's own options.
    """

    folder: Path
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise for options that would silently be overridden."""
        names = (word[2:] for word in self.extra if word.startswith("--"))
        fixed = {name.partition("=")[0].replace("-", "_") for name in names}
        for name in fixed & {*self.options, "output_dir"}:
            raise RecipeError(f"--{name} differs between the runs; leave it out behind the --.")

    def command(self) -> list[str]:
        """Return the command line."""
        options = [
            word for name, value in self.options.items() for word in (f"--{name}", str(value))
        ]
        return [
            sys.executable,
            str(SCRIPT),
            self.config,
            *options,
            *self.extra,
            "--output_dir",
            str(self.folder),
        ]

    def results(self) -> dict[str, Any] | None:
        """Return the content of ``results.json``, or None when the run is not finished."""
        path = self.folder / "results.json"
        return json.loads(path.read_text(encoding="utf8")) if path.is_file() else None


def run_side_by_side(runs: Mapping[str, Run]) -> None:
    """Run all trainings at the same time on equal shares of the cores, with a progress bar each.

    Because they run at the same time, other work on the machine slows all of them alike, and their
    speeds remain comparable. With one thread per core, no time goes into synchronization.
    """
    threads = max(1, len(available_cores()) // len(runs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = TextColumn("{task.fields[losses]}")
    with (
        Progress(*columns, TimeElapsedColumn(), shown) as progress,
        ThreadPoolExecutor(len(runs)) as pool,
    ):
        started = [
            pool.submit(run_quietly, run, threads, on_line=follow(progress, label))
            for label, run in runs.items()
        ]
        if not progress.console.is_terminal:
            print_states(started, progress)
        for training in started:
            training.result()


def print_states(started: Sequence[Future[None]], progress: Progress) -> None:
    """Print a line for each run every few seconds, for a log or a pipe, where no bar can move."""
    begun = time.monotonic()
    while wait(started, timeout=EVERY).not_done:
        for task in progress.tasks:
            of = f"step {task.completed:.0f}/{task.total:.0f}, " if task.total else ""
            seconds = time.monotonic() - begun
            print(f"{task.description}: {of}{task.fields['losses']} ({seconds:.0f} s)", flush=True)


def follow(progress: Progress, label: str) -> Callable[[str], None]:
    """Return a function that advances a progress bar when ``run.py`` prints a line."""
    task = progress.add_task(label, total=None, losses="loading torch and transformers")
    losses: dict[str, str] = {}

    def read(line: str) -> None:
        if re.match(r"loading |evaluating |evaluated |\w+: validation loss", line):
            progress.update(task, losses=line.split(";")[0].strip())
        found = re.match(r"step (\d+)/(\d+): (.*)", line)
        if found is not None:
            step, steps, said = found.groups()
            losses.update(part.split(" ") for part in said.split(", "))
            text = ", ".join(f"{name} {loss}" for name, loss in sorted(losses.items()))
            progress.update(task, completed=int(step), total=int(steps), losses=text)

    return read


def available_cores() -> Sequence[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return list(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def run_all(runs: Sequence[Run], jobs: int, label: str) -> None:
    """Run what is not finished, ``jobs`` at a time with one thread each; logs go to their folders.

    Raises:
        RuntimeError: a run failed; the message contains the end of its log.
    """
    waiting = [run for run in runs if run.results() is None]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task(label, total=len(runs), completed=len(runs) - len(waiting))
        for finished in as_completed([pool.submit(run_quietly, run) for run in waiting]):
            if finished.exception() is not None:
                pool.shutdown(cancel_futures=True)
            finished.result()
            progress.advance(task)


def run_quietly(run: Run, threads: int = 1, on_line: Callable[[str], None] | None = None) -> None:
    """Run one training; its output goes to ``log.txt`` and, line by line, to ``on_line``."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "log.txt"
    limits = {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    with (
        path.open("w", encoding="utf8") as log,
        subprocess.Popen(
            [*run.command(), "--disable_tqdm", "true"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf8",
            env=os.environ | limits,
        ) as training,
    ):
        for line in training.stdout:
            print(line, end="", file=log, flush=True)
            if on_line is not None:
                on_line(line)
    if training.returncode == DIVERGED:
        lost = {"final_validation_loss": math.inf, "diverged": True}
        (run.folder / "results.json").write_text(json.dumps(lost), encoding="utf8")
    elif training.returncode != 0:
        end = "\n".join(path.read_text(encoding="utf8").splitlines()[-8:])
        raise RuntimeError(f"{' '.join(run.command())}\nfailed; the end of {path}:\n{end}")
    elif run.results() is None:
        raise RuntimeError(f"{' '.join(run.command())}\nwas stopped by a signal, see {path}.")
