"""Values of settings: read from strings and files, converted to their declared types.

In: strings from a command line, a JSON file, loose Python values; and type hints. Out: values of
those types, or an error that names the setting, the value and what is allowed. Error messages stay
short, however long, large or nested the value is.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import re
import reprlib
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

LONGEST_SHOWN = 160
LONGEST_PATTERN, MOST_REPETITIONS = 1000, 20


def near(name: str, names: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest of some names, or nothing if none is near."""
    found = difflib.get_close_matches(name[:LONGEST_SHOWN], list(names), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""


def near_path(path: Path) -> str:
    """The same for a path where a folder or file is missing: the nearest other name beside it."""
    if path.is_file():
        return " It is a file."
    try:
        return near(path.name, [one.name for one in path.parent.iterdir()])
    except OSError:  # its folder does not exist either, or may not be read
        return ""


def shown(value: object) -> str:
    """Return a value as Python writes it, truncated if it is long."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # an int of more than 4,300 digits; a class whose __repr__ fails
        return f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST_SHOWN + 1
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 20


def sentence(error: BaseException) -> str:
    """Return the first line of an error's message, as a sentence."""
    message = getattr(error, "strerror", None) or str(error)
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    line = line or type(error).__name__
    if len(line) > 3 * LONGEST_SHOWN:
        return f"{line[: 3 * LONGEST_SHOWN]}…"
    return line if line.endswith((".", "!", "?")) else f"{line}."


def require_known(name: object, allowed: Iterable[str], kind: str, page: str = "") -> None:
    """Raise for a name that is not in ``allowed``.

    The message suggests the nearest one; it lists all unless a page of the documentation does.
    """
    names = sorted(allowed)
    if not (isinstance(name, str) and name in names):
        hint = near(name, names) if isinstance(name, str) else ""
        listed = f" {page} lists all." if hint and page else f" Allowed: {', '.join(names)}."
        raise ValueError(f"Unknown {kind}: {shown(name)}.{hint}{listed}")


def require_one_of(name: str, value: object, allowed: Iterable[str], advice: str = "") -> None:
    """Raise for a setting whose value is not among the names allowed, with the nearest one."""
    names = list(allowed)
    if not (isinstance(value, str) and value in names):
        hint = near(value, names) if isinstance(value, str) else ""
        listed = ", ".join(map(repr, names))
        raise ValueError(f"{name}={shown(value)} is not one of {listed}.{hint}{advice}")


def read_json(path: str | Path, field: str = "") -> dict[str, Any]:
    """Read a JSON file that must hold one object without duplicate keys.

    Args:
        path: The file.
        field: The setting that named the file and ``=``; errors put it before the path.
    """
    named = field + shown(str(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_object)
    except (OSError, TypeError, ValueError, RecursionError) as error:  # unreadable, not UTF-8 …
        raise ValueError(f"{named} is not a readable JSON file: {sentence(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{named} holds {shown(content)}; a JSON object is expected.")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it gives {shown(twice)} twice.")
    return made


def parsed(cls: type, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Convert strings to the declared types of the fields they name."""
    hints = get_type_hints(cls)
    for name in pairs:
        require_known(name, hints, "setting", page="docs/settings.md")
    return {name: _from_string(name, text, hints[name]) for name, text in pairs.items()}


def _from_string(name: str, text: str, hint: Any) -> Any:
    if text.lower() == "none" and type(None) in get_args(hint):
        return None
    hint = _meant(name, text, hint)
    if get_origin(hint) is Literal or hint is str:
        return text
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError(f"{name}={shown(text)}: true or false is expected.")
        return words[text.lower()]
    if get_origin(hint) is tuple:
        if get_args(hint)[0] is str:
            return tuple(_split_outside_brackets(text))
        return tuple(_from_string(name, part, float) for part in text.split(":"))
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{name}={shown(text)}: {_KIND[hint]}.") from None


def plain(value: Any) -> Any:
    """Return the value in a type that ``torch.load(weights_only=True)`` reads.

    Raises:
        TypeError: No such type fits.
    """
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # a scalar of NumPy
    if value is None or isinstance(value, bool | torch.dtype | torch.device):
        return value
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, str):
        return "".join(value)
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise TypeError(f"{type(value).__name__} is not a type that a checkpoint can hold")


def typed(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to its declared type; int passes for float and a list for a tuple.

    Subclasses, such as NumPy scalars and enum members, and one-element tensors become the plain
    type, because checkpoints that are read with ``weights_only=True`` hold nothing else.
    """
    if isinstance(value, Tensor) or getattr(value, "ndim", None) == 0:
        value = plain(value)
    if value is None and type(None) in get_args(hint):
        return None
    hint = _meant(name, value, hint)
    if get_origin(hint) is Literal:
        require_one_of(name, value, get_args(hint))
        return str.__str__(value)
    if get_origin(hint) is tuple:
        return _typed_tuple(name, value, get_args(hint))
    return _typed_scalar(name, value, hint)


def _typed_scalar(name: str, value: Any, hint: Any) -> Any:
    base = _BASES.get(hint, hint)
    if isinstance(value, base) and not isinstance(value, bool):
        try:  # an int where a float is expected; NumPy scalars; enums
            value = str.__str__(value) if hint is str else hint(value)
        except OverflowError:
            raise ValueError(f"{name}={shown(value)} is too large.") from None
    if type(value) is not hint:
        raise ValueError(f"{name}={shown(value)} is of type {type(value).__name__}; {_KIND[hint]}.")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not finite.")
    return value


_BASES: dict[Any, type] = {float: numbers.Real, int: numbers.Integral}
_KIND = {
    bool: "True or False is expected",
    int: "a whole number is expected",
    float: "a number is expected",
    str: "a string is expected",
}


def _meant(name: str, value: Any, hint: Any) -> Any:
    """Return which type of a union a value is written as: a word, a list, or a number."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    hints = [one for one in get_args(hint) if one is not type(None)]
    if len(hints) == 1:
        return hints[0]
    words = [word for hint in hints if get_origin(hint) is Literal for word in get_args(hint)]
    text = isinstance(value, str)
    if text and value in words:
        return Literal[tuple(words)]
    several = [hint for hint in hints if get_origin(hint) is tuple]
    if several and (isinstance(value, list | tuple) or (text and ":" in value)):
        return several[0]
    if text and words and not _NUMBER.fullmatch(value):
        expected = ["a number", *["several (0.9:0.98)"] * bool(several), *map(repr, words)]
        raise ValueError(
            f"{name}={shown(value)}: {', '.join(expected[:-1])} or {expected[-1]} is expected."
        )
    return next(hint for hint in hints if get_origin(hint) is None)


_NUMBER = re.compile(r"\s*[-+]?[0-9._]+(e[-+]?[0-9]+)?\s*", re.IGNORECASE)


def _typed_tuple(name: str, value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        kind = hints[0].__name__
        raise ValueError(f"{name}={shown(value)}: a tuple of {kind} values is expected.")
    if hints[-1] is not Ellipsis and len(value) != len(hints):
        raise ValueError(f"{name}={shown(value)}: {len(hints)} values are expected.")
    return tuple(typed(name, item, hints[0]) for item in value)


def check_pattern(name: str, pattern: str) -> None:
    r"""Raise unless a string is a regular expression that is safe to match parameter names with.

    Python's ``re`` backtracks without a time limit: a repetition inside a repetition, as in
    ``(a+)+$``, takes time that doubles with each character of a name. Such patterns are refused, as
    are the same repetition twice in a row (``.*.*``), many repetitions, and very long patterns. The
    rest takes polynomial time, which matters for chains such as ``.*\w*.*\w*``.
    """
    if not pattern:
        raise ValueError(f"{name} holds an empty pattern, which would match every name.")
    try:
        if len(pattern) <= LONGEST_PATTERN:
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{name} holds {shown(pattern)}, which is not a regular expression: {sentence(error)}"
        ) from error
    if len(pattern) > LONGEST_PATTERN or _may_take_forever(pattern):
        raise ValueError(
            f"{name} holds {shown(pattern)}, which may take forever to match: at most "
            f"{LONGEST_PATTERN:,} characters and {MOST_REPETITIONS} repetitions are allowed, none "
            "twice in a row (.*.*), and no repeated group that holds * + ? { or |: write [.0-9]+ "
            "for (\\.[0-9]+)+."
        )


def with_factor(name: str, item: str) -> tuple[str, float]:
    """Split ``PATTERN:FACTOR``; the pattern may contain colons, the number cannot."""
    pattern, _, text = item.rpartition(":")
    if not (pattern and _NUMBER.fullmatch(text)):
        raise ValueError(
            f"{name} holds {shown(item)}, where PATTERN:FACTOR is expected (optim_args: "
            f"{name}=embed_tokens:0.5|layers:0.1)."
        )
    return pattern, _from_string(name, text, float)


_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[a-zA-Z:=!<>#-]*|.", re.DOTALL)
_TWICE = re.compile(r"(\\?.)[*+]\1[*+]", re.DOTALL)


def _may_take_forever(pattern: str) -> bool:
    tokens = _TOKEN.findall(pattern)
    varies = [False]  # per open group: whether it can match in several ways
    for token, after in zip(tokens, [*tokens[1:], ""], strict=True):
        if token.startswith("("):
            varies.append(False)
        elif token == ")" and len(varies) > 1:
            inside = varies.pop()
            if inside and after in ("*", "+", "{"):
                return True
            varies[-1] |= inside
        else:
            varies[-1] |= token in ("*", "+", "?", "{", "|")
    repetitions = sum(token in ("*", "+", "?", "{") for token in tokens)
    return repetitions > MOST_REPETITIONS or _TWICE.search(pattern) is not None


def _split_outside_brackets(text: str) -> list[str]:
    """Split at each ``|`` outside (), [] and {}; inside, it is part of the regex."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += token.startswith(("(", "{")) - (token in (")", "}"))
        if token == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]
