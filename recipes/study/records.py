"""Records of trainings, one line of JSON each, written as each training finishes.

In: runs, and their results. Out: the same, also after an interruption: runs in the file are not
trained again. Each line is written at once; a line that a kill cut off is skipped.
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
    """One training as plain values: everything that its result depends on.

    Attributes:
        arm: name of the competitor.
        cell: what all arms have in common, such as text and steps.
        settings: the arm's fixed settings.
        point: the coordinates of its search, by name.
        seed: seed of the weights and of the order of the data.
    """

    arm: str
    cell: Mapping[str, Any]
    settings: Mapping[str, Any]
    point: Mapping[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """A string that identifies the run, also after JSON has turned tuples into lists."""
        return json.dumps(asdict(self), sort_keys=True)


class Records:
    """The trainings in a file, or in given lines.

    Args:
        path: JSONL file, which need not exist. Default: none, so nothing is written.
        lines: lines to start with. Default: none.
    """

    def __init__(self, path: Path | None = None, lines: Iterable[Line] = ()) -> None:
        self.path, self._lines = path, {}
        for line in (*lines, *(read(path) if path else ())):
            self._lines.setdefault(run_of(line).key, line)

    def __contains__(self, run: Run) -> bool:
        """Return whether a training has finished."""
        return run.key in self._lines

    def __getitem__(self, run: Run) -> Line:
        """Return the recorded line of a training."""
        return self._lines[run.key]

    def __iter__(self) -> Iterator[Line]:
        """Yield all lines in the order in which they were written."""
        return iter(self._lines.values())

    def loss(self, run: Run) -> float:
        """Return a run's final loss; infinite if it diverged."""
        loss = self[run]["found"]["loss"]
        return math.inf if loss is None else float(loss)

    def add(self, run: Run, found: Mapping[str, Any]) -> None:
        """Record a training, in the file first."""
        line = {**asdict(run), "found": dict(found)}
        if self.path is not None:
            append(self.path, line)
        self._lines[run.key] = line


def run_of(line: Line) -> Run:
    """Return the run that a line records."""
    return Run(**{name: line[name] for name in Run.__dataclass_fields__})


def append(path: Path, line: Line) -> None:
    """Append a line to a file in one write, on a new line if a kill cut off the last one."""
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
