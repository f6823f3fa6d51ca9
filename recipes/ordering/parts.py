"""Parts of an experiment: each is computed once and kept; several run at a time.

In: functions of importable modules with plain arguments. Out: their plain results, each in a JSON
file of its own with the arguments. A part that exists with the same arguments is not computed
again, so that an interrupted experiment continues where it stopped.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shared.progress import quiet_libraries


class Task(NamedTuple):
    """The work of one part: ``function(**arguments)``; arguments and result go through JSON."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]


class Parts:
    """The parts of one experiment.

    Args:
        folder: where they are kept.
        workers: processes that compute; None computes in this one.
    """

    def __init__(self, folder: Path, workers: Executor | None = None) -> None:
        self.folder, self.workers = folder, workers

    def __call__(self, tasks: Mapping[str, Task]) -> dict[str, Any]:
        """Return the result of every task by name; compute what is missing."""
        missing = {name: task for name, task in tasks.items() if self.kept(name, task) is None}
        for count, (name, seconds) in enumerate(self._computed(missing), 1):
            print(f"  {name}: {seconds:.0f} s ({count}/{len(missing)})", flush=True)
        return {name: self.kept(name, task)["result"] for name, task in tasks.items()}

    def kept(self, name: str, task: Task) -> dict[str, Any] | None:
        """Return the content of a part's file, or None if it belongs to other arguments."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf8"))
        return content if content["arguments"] == plain(task.arguments) else None

    def seconds(self) -> float:
        """Return the total time of all parts, in process seconds."""
        contents = (json.loads(path.read_text(encoding="utf8")) for path in self._files())
        return sum(content["seconds"] for content in contents)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def _computed(self, tasks: Mapping[str, Task]) -> Any:
        """Yield name and seconds of each part once it is written."""
        if self.workers is None:
            for name, task in tasks.items():
                yield name, compute(self.folder / f"{name}.json", task)
            return
        waiting: dict[Future[float], str] = {
            self.workers.submit(compute, self.folder / f"{name}.json", task): name
            for name, task in tasks.items()
        }
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def compute(path: Path, task: Task) -> float:
    """Compute one part, write it, and return the seconds it took."""
    started = time.perf_counter()
    result = task.function(**task.arguments)
    seconds = time.perf_counter() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"arguments": task.arguments, "seconds": round(seconds, 2), "result": result}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf8") as file:
        json.dump(content, file)
    os.replace(file.name, path)  # so that an interruption leaves no partial file
    return seconds


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples become lists, keys strings."""
    return json.loads(json.dumps(value))


def processes(count: int) -> ProcessPoolExecutor:
    """Return worker processes with one thread each, which is enough for small matrices."""
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=prepare_process)


def prepare_process() -> None:
    """Use one thread, and silence libraries, so that output is about the parts only."""
    torch.set_num_threads(1)
    quiet_libraries()
