"""Training runs as processes of their own.

In: a configuration, its overrides and an output folder for each run. Out: their ``results.json``.
A run that has one already is not repeated, so that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SCRIPT = Path(__file__).with_name("run.py")
DIVERGED = 3  # run.py's exit status when a gradient was not finite


@dataclass(frozen=True)
class Run:
    """One training run: ``run.py config --name value ... --output_dir folder``."""

    folder: Path
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: Sequence[str] = ()

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


def run_in_front(run: Run) -> None:
    """Run one training in the foreground, with its progress bar."""
    subprocess.run(run.command(), check=True)


def run_all(runs: Sequence[Run], jobs: int, label: str) -> None:
    """Run what is not finished, ``jobs`` at a time with one thread each, logs in the folders.

    Raises:
        RuntimeError: a run failed; the message holds the end of its log.
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


def run_quietly(run: Run) -> None:
    """Run one training on one thread, its output in ``log.txt``."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    one_thread = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    with log.open("w", encoding="utf8") as output:
        status = subprocess.run(
            [*run.command(), "--disable_tqdm", "true"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | one_thread,
        ).returncode
    if status == DIVERGED:
        lost = {"final_validation_loss": math.inf, "diverged": True}
        (run.folder / "results.json").write_text(json.dumps(lost), encoding="utf8")
    elif status != 0:
        end = "\n".join(log.read_text(encoding="utf8").splitlines()[-8:])
        raise RuntimeError(f"{' '.join(run.command())}\nfailed; the end of {log}:\n{end}")
