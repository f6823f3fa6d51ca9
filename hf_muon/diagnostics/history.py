"""``spectra.jsonl``: the records of a monitor, one per line.

In: records. Out: the records of the run as it stands. Lines are only ever appended. A line with
``begin`` starts a run, or resumes one after that many steps; the steps after it were then trained
again, so that readers skip their earlier records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE_NAME = "spectra.jsonl"
_BEGIN = '{"begin"'

Record = dict[str, Any]


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append a line for each record; first end a line that a crash cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                lines = "\n" + lines
        file.write(lines.encode())


def read_spectra(path: str | Path) -> list[Record]:
    """Return the samples of the run in a file, without those of steps that were trained again.

    Args:
        path: The file, or the output folder that contains it.

    Returns:
        Records with ``step``, ``layer`` and values by name, in the order of the steps.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not JSON, and was not cut short by a crash.
    """
    return [record for record in _records(Path(path)) if "warning" not in record]


def read_warnings(path: str | Path) -> list[Record]:
    """Return the warnings of the run in a file; arguments as for :func:`read_spectra`.

    Returns:
        Records with ``step``, ``layer`` (empty if it concerns all layers) and ``warning``.
    """
    return [record for record in _records(Path(path)) if "warning" in record]


def _records(path: Path) -> list[Record]:
    """Return all records of the run as it stands, except ``begin`` lines."""
    path = path / FILE_NAME if path.is_dir() else path
    found: list[Record] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, (line, after) in enumerate(zip(lines, [*lines[1:], _BEGIN], strict=True), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if after.startswith(_BEGIN):  # a crash cut the last line of a part short
                continue
            raise ValueError(f"Line {number} of {path} is no JSON: {error}.") from error
        if "begin" in record:
            found = [one for one in found if one["step"] <= record["begin"]]
        elif record:
            found.append(record)
    return found
