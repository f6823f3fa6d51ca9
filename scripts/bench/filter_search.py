"""The best rate of each arm, then fresh seeds there: trainings that are kept as they finish.

In: plans, and the JSONL file with what has been trained. Out: the same file, with a line more for
each training. What is missing is always read from the file, so that a study that was stopped goes
on, and one that grew trains what is new.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from byte_llama import Run, train

SEARCH_SEED = 0
FACTOR = 2.0
MOST_RATES = 14
"""A search that has no best rate between worse ones by then ends without fresh seeds."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is trained of an arm in a cell.

    Attributes:
        arm: its name.
        run: of which rate and seed differ.
        start: the rate at which the search begins.
        seeds: that the search does not see.
    """

    arm: str
    run: Run
    start: float
    seeds: Sequence[int]

    def missing(self, runs: Runs) -> list[Run]:
        """Return what is to be trained next: rates, or, once one is the best, seeds."""
        losses = {rate: runs.loss(self.arm, self._at(rate)) for rate in runs.rates(self)}
        rates = next_rates(losses, self.start)
        if rates:
            return [self._at(rate) for rate in rates if len(losses) < MOST_RATES]
        there = self._at(best_rate(losses))
        return [
            run
            for run in (replace(there, seed=seed) for seed in self.seeds)
            if not runs.has(self.arm, run)
        ]

    def _at(self, rate: float) -> Run:
        return replace(self.run, rate=rate, seed=SEARCH_SEED)


def next_rates(losses: Mapping[float, float], start: float) -> list[float]:
    """Return the rates to try: the first three, then what is missing on both sides of the best."""
    centre = best_rate(losses) if losses else start
    return [
        rate
        for rate in dict.fromkeys((centre, centre / FACTOR, centre * FACTOR))
        if rate not in losses
    ]


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate of the lowest loss; the lowest rate where all diverged."""
    return min(losses, key=lambda rate: (losses[rate], rate))


class Runs:
    """The trainings that stand in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self._lines = path, {}
        for line in read(path):
            self._lines.setdefault(key_of(line), line)

    def has(self, arm: str, run: Run) -> bool:
        """Return whether a training has finished."""
        return key(arm, run) in self._lines

    def loss(self, arm: str, run: Run) -> float:
        """Return what it ended at; infinite where it diverged."""
        loss = self._lines[key(arm, run)]["loss"]
        return math.inf if loss is None else loss

    def rates(self, plan: Plan) -> list[float]:
        """Return the rates that the search of a plan has tried."""
        found = {line["rate"] for line in self._lines.values() if line["arm"] == plan.arm}
        at = {rate: replace(plan.run, rate=rate, seed=SEARCH_SEED) for rate in found}
        return [rate for rate, run in at.items() if self.has(plan.arm, run)]

    def add(self, arm: str, run: Run, found: Mapping[str, Any]) -> None:
        """Keep a training, on disk first."""
        line = {"arm": arm, **asdict(run), **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() and not ends_a_line(file):
                file.write(b"\n")  # a writer was killed within its line
            file.write(json.dumps(line).encode() + b"\n")
        self._lines[key(arm, run)] = line


def ends_a_line(file: Any) -> bool:
    """Return whether the last byte of a file, open at its end, is a newline."""
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def read(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, without one that was cut off."""
    for text in path.read_text("utf8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def key(arm: str, run: Run) -> str:
    """Return what tells a training from others, as it is in the file."""
    return json.dumps([arm, asdict(run)], sort_keys=True)


def key_of(line: Line) -> str:
    """Return the same of a line."""
    run = {name: line[name] for name in Run.__dataclass_fields__}
    return json.dumps([line["arm"], run], sort_keys=True)


def study(runs: Runs, plans: Sequence[Plan], jobs: int) -> None:
    """Train what is missing, several at a time."""
    with workers(jobs) as pool:
        waiting: dict[Future[dict[str, Any]], tuple[str, Run]] = {}
        while True:
            queued = {key(arm, run) for arm, run in waiting.values()}
            for plan in plans:
                for run in plan.missing(runs):
                    if key(plan.arm, run) not in queued:
                        waiting[pool.submit(train, run)] = plan.arm, run
            if not waiting:
                return
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                arm, run = waiting.pop(done)
                runs.add(arm, run, done.result())
                print(told(arm, run, done.result()), flush=True)


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """Return processes that end with this one; what waits is dropped after an error."""
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=leave_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def leave_with_parent() -> None:
    """End this process when the one that started it is gone, even if it was killed."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def told(arm: str, run: Run, found: Mapping[str, Any]) -> str:
    """Return a line about a training that has finished."""
    loss = "diverged" if found["loss"] is None else f"{found['loss']:.4f}"
    noise = "" if run.noise == "none" else f", {run.noise}"
    cell = f"{run.tokens}x{run.steps}{noise}"
    return f"{arm} ({cell}), rate {run.rate:g}, seed {run.seed}: {loss} ({found['seconds']:.0f} s)"
