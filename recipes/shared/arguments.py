"""Arguments of a recipe: a YAML file, overridden by the command line.

In: ``sys.argv``-like strings and the dataclasses that hold the arguments. Out: the parser and the
merged values, from which ``parser.parse_dict`` makes the dataclasses. Names that no dataclass has
are refused with the nearest one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class RecipeError(ValueError):
    """A mistake the user can mend; the scripts print it without a traceback."""


@dataclass(frozen=True)
class Arguments:
    """The parser of a recipe, all values, and the configuration's name."""

    parser: HfArgumentParser
    values: dict[str, Any]
    stem: str


def read(argv: Sequence[str], kinds: Sequence[type], recipe: Path, **defaults: object) -> Arguments:
    """Read ``[config.yaml] [--name value ...]``; the command line overrides the file.

    Args:
        argv: arguments without the program's name.
        kinds: dataclasses whose fields are the arguments.
        recipe: folder that holds ``configs/``; its name is that of the default output folder.
        **defaults: values where they differ from those of the dataclasses.

    Raises:
        RecipeError: a file or a name in it that does not exist.
    """
    parser = HfArgumentParser(kinds)
    parser.set_defaults(**defaults)
    rest = without_rank(argv)
    stem = "custom"
    if rest and not rest[0].startswith("-"):
        path = find_config(rest.pop(0), recipe)
        parser.set_defaults(**read_config(path, kinds))
        stem = path.stem
    values = vars(parser.parse_args(rest))
    if values["output_dir"] is None:
        values["output_dir"] = f"runs/{recipe.name}/{stem}_{values['optim']}"
    return Arguments(parser, values, stem)


def without_rank(argv: Sequence[str]) -> list[str]:
    """Leave out the rank that DeepSpeed's launcher puts first; it is in the environment as well."""
    return [word for word in argv if not word.startswith("--local_rank=")]


def find_config(name: str, recipe: Path) -> Path:
    """Return the YAML file of that path, looked for here and in the recipe's folder."""
    for path in (Path(name), recipe / name):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in (recipe / "configs").glob("*.yaml")))
    raise RecipeError(f"No configuration file {name!r}. The recipe has configs/ of: {shipped}.")


def read_config(path: Path, kinds: Sequence[type]) -> dict[str, Any]:
    """Return the values of a YAML file, after a check of every name."""
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf8")) or {}
    allowed = {item.name for kind in kinds for item in fields(kind)}
    for name in values:
        if name not in allowed:
            raise RecipeError(
                f"{path} sets {name!r}, which no argument has.{nearest(name, allowed)}"
            )
    return values


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def checkpoint(training: TrainingArguments) -> str | None:
    """Return the checkpoint to go on from.

    ``last`` is the newest one of the output folder; ``auto`` is the same, or the beginning when
    there is none, so that a job can be started and restarted with one command.
    """
    asked = training.resume_from_checkpoint
    if asked not in ("last", "auto"):
        return asked
    found = newest_checkpoint(Path(training.output_dir))
    if found is None and asked == "last":
        raise RecipeError(
            f"There is no checkpoint in {training.output_dir} to go on from. "
            "--resume_from_checkpoint auto begins in that case."
        )
    return found


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint, or None.

    The Trainer writes ``trainer_state.json`` last; a checkpoint without it was interrupted.
    """
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return str(max(found, key=lambda path: int(path.name.split("-")[-1]))) if found else None
