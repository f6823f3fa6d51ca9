"""Search each arm, then train paired seeds; the records determine which trainings are missing.

In: arms, a cell, a function that trains once. Out: records. The same command continues a study that
was stopped, and trains only what is new in a study that was extended. Arms without a search come
first, then all searches, then the seeds, one seed at a time for all arms, so that a stopped study
has complete pairs.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from study.descent import Axis, Point, best_point, next_points
from study.records import Line, Records, Run, run_of

Train = Callable[[Run], dict[str, Any]]
"""Trains once; returns plain values, including ``loss`` (None if it diverged) and ``seconds``."""


@dataclass(frozen=True)
class Arm:
    """A competitor.

    Attributes:
        settings: its fixed settings.
        start: the point where the search begins, by coordinate.
        axes: how each coordinate changes, in the order of the search; a coordinate whose axis is
            None stays as it is.
        first: further points that are always tried, by coordinate: a starting grid.
    """

    settings: Mapping[str, Any]
    start: Mapping[str, Any]
    axes: Mapping[str, Axis]
    first: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Plan:
    """The trainings of an arm in a cell.

    Attributes:
        name: name of the arm.
        arm: its settings and its search.
        cell: what all arms have in common.
        seeds: seeds of the evaluation; the search does not use them.
        search_seeds: seeds of the search, which averages over them.
        budget: the most points that the search may try; then it ends with the best so far.
    """

    name: str
    arm: Arm
    cell: Mapping[str, Any]
    seeds: Sequence[int] = ()
    search_seeds: Sequence[int] = (0,)
    budget: int = 24

    @property
    def is_searched(self) -> bool:
        """Whether the arm has anything to search."""
        return any(axis is not None for axis in self.arm.axes.values())

    @property
    def start(self) -> Point:
        """The point at which the search begins."""
        return tuple(self.arm.start[name] for name in self.arm.axes)

    def run(self, point: Point, seed: int) -> Run:
        """Return the run at a point; its values are in the order of the axes."""
        at = {**self.arm.start, **dict(zip(self.arm.axes, point, strict=True))}
        return Run(self.name, self.cell, self.arm.settings, at, seed)

    def tried(self, records: Records) -> dict[Point, float]:
        """Return the mean loss over the search seeds at each point tried so far."""
        found = {}
        for line in filter(self.holds, records):
            point = tuple(line["point"][name] for name in self.arm.axes)
            runs = [self.run(point, seed) for seed in self.search_seeds]
            if point not in found and all(run in records for run in runs):
                found[point] = statistics.fmean(records.loss(run) for run in runs)
        return found

    def holds(self, line: Line) -> bool:
        """Return whether a training belongs to this arm, with this cell and these settings."""
        own = Run(self.name, self.cell, self.arm.settings, line["point"], line["seed"])
        return own.key == run_of(line).key and line["point"].keys() == self.arm.start.keys()

    def untried(self, losses: Mapping[Point, float]) -> list[Point]:
        """Return the points that the search would try next, ignoring the budget."""
        first = [tuple(point[name] for name in self.arm.axes) for point in self.arm.first]
        return next_points(losses, [self.start, *first], tuple(self.arm.axes.values()))

    def best(self, records: Records) -> Point | None:
        """Return the best point so far."""
        losses = self.tried(records)
        return best_point(losses) if losses else None

    def missing(self, records: Records) -> list[tuple[int, Run]]:
        """Return the runs still to train, each with its place in the order of the study."""
        losses = self.tried(records)
        room = self.budget - len(losses)
        points = self.untried(losses)[:room] if room > 0 else []
        if points and self.is_searched:
            seeds, place = self.search_seeds, 1
        else:
            points = points or [best_point(losses)]
            seeds, place = self.seeds, 2 if self.is_searched else 0
        runs = [self.run(point, seed) for seed in seeds for point in points]
        return [(place, run) for run in runs if run not in records]


def study(records: Records, plans: Sequence[Plan], train: Train, jobs: int = 1) -> None:
    """Train what is missing, ``jobs`` runs at a time; a single job runs in this process."""
    with workers(jobs) as pool:
        waiting: dict[Future[dict[str, Any]], Run] = {}
        while True:
            queued = {run.key for run in waiting.values()}
            todo = [run for run in in_order(records, plans) if run.key not in queued]
            for run in todo[: jobs - len(waiting)]:
                waiting[pool.submit(train, run)] = run
            if not waiting:
                return
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                run = waiting.pop(done)
                records.add(run, done.result())
                print(told(run, done.result()), flush=True)


def in_order(records: Records, plans: Sequence[Plan]) -> list[Run]:
    """Return the missing runs of all plans, one seed at a time for all arms."""
    missing = [(number, *one) for number, plan in enumerate(plans) for one in plan.missing(records)]

    def place(entry: tuple[int, int, Run]) -> tuple[int, int, int]:
        number, stage, run = entry
        return (stage, run.seed, number) if stage == 2 else (stage, number, run.seed)

    return [run for *_, run in sorted(missing, key=place)]


class Here(Executor):
    """An executor that runs work immediately, in this process."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function now."""
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """Yield worker processes that end with this one; an error cancels pending work."""
    if count == 1:
        yield Here()
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=leave_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def leave_with_parent() -> None:
    """End this process when its parent is gone, even if the parent was killed."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def told(run: Run, found: Mapping[str, Any]) -> str:
    """Return a line that describes a finished training."""
    loss = found["loss"]
    shown = "diverged" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"
    return f"{run.arm} ({named(run.point)}), seed {run.seed}: {shown} ({found['seconds']:.0f} s)"


def named(values: Mapping[str, Any]) -> str:
    """Return values with their names, as in ``rate 0.002, momentum 0.9``."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )
