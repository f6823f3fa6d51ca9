"""Text of your own: a file, a folder of files, or a mixture described in a YAML file.

In: a path. Out: documents; for a mixture, its parts. A ``.txt`` file is one document; each line of
a ``.jsonl`` and each row of a ``.parquet`` is one. Everything is read into memory. A file that
cannot be read is refused in one sentence that names the file and the place in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hf_muon.values import near
from shared.arguments import RecipeError, load_yaml

PREFIX = "file:"
MIXTURES = (".yaml", ".yml")


class Document(NamedTuple):
    """One text with a name that is unique in its corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """A part of a mixture: a corpus, and its relative share of the training text."""

    corpus: str
    weight: float = 1.0
    text_column: str = "text"


def is_path(corpus: str) -> bool:
    """Return whether a corpus is own text: ``file:…``, or a path with one of the extensions.

    ``datasets`` opens other paths as data sets, and streams them.
    """
    return corpus.startswith(PREFIX) or corpus.endswith((*READERS, *MIXTURES))


def path_of(corpus: str, folder: Path = Path()) -> Path:
    """Return the path of a corpus; relative paths start at ``folder``.

    Raises:
        RecipeError: the path does not exist.
    """
    path = folder / Path(corpus.removeprefix(PREFIX)).expanduser()
    if not path.exists():
        raise RecipeError(
            f"The corpus {corpus!r}: there is no file or folder {path.absolute()}. Paths are "
            "relative to where you start, in a mixture to its YAML file."
        )
    return path


def documents(path: Path, column: str) -> list[Document]:
    """Return the documents in a file, or in all files below a folder.

    Args:
        path: of a ``.txt``, ``.jsonl`` or ``.parquet`` file, or of a folder with such files.
        column: the text's column in the latter two.

    Raises:
        RecipeError: there is no text, or it cannot be read.
    """
    inside = path.rglob("*") if path.is_dir() else [path]
    files = sorted(file for file in inside if file.suffix in READERS and file.is_file())
    if not files:
        what = "holds no" if path.is_dir() else "is no"
        raise RecipeError(
            f"{path} {what} text: files that end in {', '.join(READERS)} are read; mixtures of "
            f"them are described in one that ends in {' or '.join(MIXTURES)}."
        )
    root = path if path.is_dir() else path.parent
    found = [
        Document(file.relative_to(root).as_posix() + place, text)
        for file in files
        for place, text in READERS[file.suffix](file, column)
        if text.strip()
    ]
    if not found:
        raise RecipeError(f"{path} is empty: nothing in it is text to train on.")
    return found


def whole(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """Yield the text of a file."""
    try:
        yield "", path.read_text("utf8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no UTF-8 text: {error}. Convert it first.") from error


def json_lines(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """Yield the number and the text of each line."""
    for number, line in enumerate(next(whole(path, column))[1].split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RecipeError(f"{where} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise RecipeError(f"{where} is a {type(row).__name__}; {{{column!r}: …}} is expected.")
        require_column(column, row, where)
        yield f":{number:09}", as_text(row[column], column, where)


def parquet_rows(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """Yield the number and the text of each row."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            require_column(column, file.schema_arrow.names, str(path))
            rows = file.read(columns=[column])[column]
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(f"{path} cannot be read as Parquet: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f":{number:09}", as_text(row.as_py(), column, f"{path}, row {number}")


def require_column(column: str, columns: Iterable[str], where: str) -> None:
    """Raise unless the column exists."""
    names = list(columns)
    if column not in names:
        raise RecipeError(
            f"{where} has no column {column!r}.{near(column, names)} It has: {', '.join(names)}. "
            "Name the one that holds the text with --text_column, in a mixture with text_column."
        )


def as_text(value: Any, column: str, where: str) -> str:
    """Return a text; empty if it is missing."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecipeError(
            f"{where}: the column {column!r} is of type {type(value).__name__}; text is expected."
        )
    return value


READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, str]]]] = {
    ".txt": whole,
    ".jsonl": json_lines,
    ".parquet": parquet_rows,
}
"""By the end of a file's name: what yields the place in the file, and the text there."""


def mixture(path: Path, column: str) -> list[Source]:
    """Return the parts of a mixture: a list of ``corpus``, ``weight`` and ``text_column``.

    Raises:
        RecipeError: the file does not contain such a list.
    """
    found = load_yaml(path)
    if not isinstance(found, list) or not found:
        raise RecipeError(
            f"{path} holds no mixture: a list is expected, with lines as "
            "`- {corpus: file:notes.txt, weight: 2}`."
        )
    return [source(entry, f"{path}, entry {n}", column) for n, entry in enumerate(found, 1)]


def source(entry: Any, where: str, column: str) -> Source:
    """Return a part of a mixture, after checking its names and values."""
    names = list(Source.__dataclass_fields__)
    if not isinstance(entry, dict) or "corpus" not in entry:
        raise RecipeError(f"{where} names no corpus. It has: {', '.join(names)}.")
    for name in entry:
        if name not in names:
            raise RecipeError(f"{where} sets {name!r}.{near(str(name), names)}")
    made = Source(**{"text_column": column, **entry})
    for name, value in (("corpus", made.corpus), ("text_column", made.text_column)):
        if not isinstance(value, str):
            raise RecipeError(f"{where}: {name}={value!r} must be text.")
    if isinstance(made.weight, bool) or not isinstance(made.weight, int | float):
        raise RecipeError(f"{where}: weight={made.weight!r} must be a number.")
    if not 0 < made.weight < float("inf"):
        raise RecipeError(f"{where}: weight={made.weight!r} must be above 0.")
    return made
