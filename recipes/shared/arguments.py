"""Arguments of a recipe: a YAML file, overridden by the command line.

In: ``sys.argv``-like strings and the dataclasses that define the arguments. Out: the merged values,
and the dataclasses built from them. Unknown names, and values of a wrong type or without meaning,
are refused in one sentence that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_muon.values import near, parsed, sentence, typed


class RecipeError(ValueError):
    """A mistake that the user can fix; the scripts print it without a traceback."""


@dataclass(frozen=True)
class Arguments:
    """The parser of a recipe, all values, and the name of the configuration."""

    parser: HfArgumentParser
    values: dict[str, Any]
    stem: str

    def made(self) -> tuple[Any, ...]:
        """Return the dataclasses.

        Raises:
            RecipeError: one of them refuses its values.
        """
        try:
            return self.parser.parse_dict(self.values)
        except (TypeError, ValueError) as error:
            raise RecipeError(sentence(error)) from error


def read(argv: Sequence[str], kinds: Sequence[type], recipe: Path, **defaults: object) -> Arguments:
    """Read ``[config.yaml] [--name value ...]``; the command line overrides the file.

    Args:
        argv: arguments without the program's name.
        kinds: dataclasses whose fields are the arguments.
        recipe: folder that contains ``configs/``; its name is also the default output folder's.
        **defaults: values that differ from the dataclasses' defaults.

    Raises:
        RecipeError: a file cannot be read, or a name or value in it makes no sense.
    """
    parser = HfArgumentParser(kinds)
    parser.set_defaults(**defaults)
    rest = without_rank(argv)
    stem, path, of_file = "custom", Path(), {}
    if rest and not rest[0].startswith("-"):
        path = find_config(rest.pop(0), recipe)
        stem, of_file = path.stem, read_config(path, kinds)
        parser.set_defaults(**of_file)
    values = vars(parser.parse_args(rest))
    for name in counts(kinds):
        if values.get(name) is not None and values[name] < 1:
            where = f" in {path}" if values[name] == of_file.get(name) else ""
            raise RecipeError(f"{name}={values[name]}{where} must be at least 1.")
    if values["output_dir"] is None:
        values["output_dir"] = f"runs/{recipe.name}/{stem}_{values['optim']}"
    return Arguments(parser, values, stem)


def counts(kinds: Sequence[type]) -> list[str]:
    """Return the names of the whole numbers that a recipe adds, and of the Trainer's batches."""
    own = [kind for kind in kinds if not issubclass(kind, TrainingArguments)]
    hints = {name: hint for kind in own for name, hint in get_type_hints(kind).items()}
    batches = ["per_device_train_batch_size", "per_device_eval_batch_size"]
    return [name for name, hint in hints.items() if hint in (int, int | None)] + batches


def without_rank(argv: Sequence[str]) -> list[str]:
    """Drop the rank that DeepSpeed's launcher puts first; it is also in the environment."""
    return [word for word in argv if not word.startswith("--local_rank=")]


def find_config(name: str, recipe: Path) -> Path:
    """Return the path of the YAML file, searched for here and in the recipe's folder."""
    for path in (Path(name), recipe / name):
        if path.is_file():
            return path
    shipped = sorted(path.name for path in (recipe / "configs").glob("*.yaml"))
    hint = near(name, [f"configs/{file}" for file in shipped])
    raise RecipeError(
        f"No configuration file {name!r}.{hint} The recipe has, in configs/: {', '.join(shipped)}."
    )


def read_config(path: Path, kinds: Sequence[type]) -> dict[str, Any]:
    """Return the values of a YAML file, after checking every name and every plain type."""
    values = load(path)
    kind_of = {item.name: kind for kind in kinds for item in fields(kind)}
    for name, value in values.items():
        if name not in kind_of:
            raise RecipeError(
                f"{path} sets {name!r}, which no argument has.{near(str(name), kind_of)}"
            )
        try:
            check_type(name, value, kind_of[name])
        except ValueError as error:
            raise RecipeError(f"{path}: {error}") from error
    return values


def load(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file."""
    values = load_yaml(path)
    if not isinstance(values, dict | None):
        raise RecipeError(
            f"{path} holds a {type(values).__name__}; lines of name: value are expected."
        )
    return values or {}


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as UTF-8 text: {sentence(error)}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())[:300]}") from error


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise unless a field of a plain type accepts the value, or a text.

    The Trainer's own text fields also accept other types, and check them.
    """
    hint = get_type_hints(kind)[name]
    (plain, *others) = set(get_args(hint)) - {type(None)} or {hint}
    checked = {int, float, bool} | (set() if issubclass(kind, TrainingArguments) else {str})
    if others or plain not in checked:
        return
    if isinstance(value, str):
        parsed(kind, {name: value})
    else:
        typed(name, value, hint)


def checkpoint(training: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from.

    ``last`` is the newest one in the output folder. ``auto`` is the same, or None if there is none,
    so that one command can start and restart a job.
    """
    asked = training.resume_from_checkpoint
    if asked not in ("last", "auto"):
        return asked
    found = newest_checkpoint(Path(training.output_dir), say=training.process_index == 0)
    if found is None and asked == "last":
        raise RecipeError(
            f"There is no whole checkpoint in {training.output_dir} to go on from. "
            "--resume_from_checkpoint auto begins in that case."
        )
    return found


def newest_checkpoint(folder: Path, say: bool = True) -> str | None:
    """Return the newest complete checkpoint, or None.

    The Trainer writes ``trainer_state.json`` last: a checkpoint without a complete one was
    interrupted. It is skipped, and named if ``say``, so that a requeued job continues.
    """
    paths = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    steps = {
        path.parent: path.parent.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in paths
    }
    found = {path: int(step) for path, step in steps.items() if step.isdecimal()}  # no copies
    for path in sorted(found, key=found.__getitem__, reverse=True):
        try:
            state = json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf8"))
            if isinstance(state, Mapping) and isinstance(state["global_step"], int):
                return str(path)
        except (ValueError, KeyError):
            pass
        if say:
            print(f"{path} is damaged ({TRAINER_STATE_NAME}): passed over.", flush=True)
    return None
