"""Trainings that are kept as they finish, a line of JSON each.

In: runs, and what was found. Out: the same after an interruption: what stands in the file is not
trained again. A line is written in one piece; one that a kill cut off is passed over.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training, as plain values: everything that its result depends on.

    Attributes:
        arm: what competes.
        cell: what all arms have in common, such as text and steps.
        settings: what is fixed in the arm.
        point: what its search moves, by name.
        seed: of the weights and of the order of the data.
    """

    arm: str
    cell: Mapping[str, Any]
    settings: Mapping[str, Any]
    point: Mapping[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """What tells a run from others, also after JSON has made lists of tuples."""
        return json.dumps(asdict(self), sort_keys=True)


class Records:
    """The trainings that stand in a file, or in given lines.

    Args:
        path: JSONL file, which need not exist; without one nothing is written.
        lines: to begin with.
    """

    def __init__(self, path: Path | None = None, lines: Iterable[Line] = ()) -> None:
        self.path, self._lines = path, {}
        for line in (*lines, *(read(path) if path else ())):
            self._lines.setdefault(run_of(line).key, line)

    def __contains__(self, run: Run) -> bool:
        """Return whether a training has finished."""
        return run.key in self._lines

    def __getitem__(self, run: Run) -> Line:
        """Return the line of a training."""
        return self._lines[run.key]

    def __iter__(self) -> Iterator[Line]:
        """Yield all lines in the order in which they were written."""
        return iter(self._lines.values())

    def loss(self, run: Run) -> float:
        """Return what a run ended at; infinite where it diverged."""
        loss = self[run]["found"]["loss"]
        return math.inf if loss is None else float(loss)

    def add(self, run: Run, found: Mapping[str, Any]) -> None:
        """Keep a training, on disk first."""
        line = {**asdict(run), "found": dict(found)}
        if self.path is not None:
            append(self.path, line)
        self._lines[run.key] = line


def run_of(line: Line) -> Run:
    """Return the run of a line."""
    return Run(**{name: line[name] for name in Run.__dataclass_fields__})


def append(path: Path, line: Line) -> None:
    """Add a line to a file in one write, after one that a kill cut off on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        begin = b"" if not file.tell() or ends_a_line(file) else b"\n"
        file.write(begin + json.dumps(line, allow_nan=False).encode() + b"\n")
        os.fsync(file.fileno())


def ends_a_line(file: Any) -> bool:
    """Return whether the last byte of a file, open at its end, is a newline."""
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def read(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, without those that were cut off."""
    for text in path.read_text("utf8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and line.keys() >= {*Run.__dataclass_fields__, "found"}:
            yield line
