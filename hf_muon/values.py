"""Values of settings: read from strings and files, and brought to their declared types.

In: strings of a command line, a JSON file, loose Python values; and type hints. Out: values of
these types, or an error that names the setting, the value and what is allowed.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import numbers
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


def require_known(name: str, allowed: Iterable[str], kind: str) -> None:
    """Raise for a name that is not in ``allowed``, with the nearest one."""
    names = sorted(allowed)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown {kind}: {name!r}.{hint} Allowed: {', '.join(names)}.")


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file that must hold one object."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # unreadable, not UTF-8, not JSON
        raise ValueError(f"config={str(path)!r} is not a readable JSON file: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config={str(path)!r} holds {settings!r}; a JSON object is expected.")
    return settings


def parsed(cls: type, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Strings turned into the declared types of the fields they name."""
    hints = get_type_hints(cls)
    for name in pairs:
        require_known(name, hints, "setting")
    return {name: _from_string(name, text, hints[name]) for name, text in pairs.items()}


def _from_string(name: str, text: str, hint: Any) -> Any:
    if type(None) in get_args(hint):
        if text.lower() == "none":
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal or hint is str:
        return text
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError(f"{name}={text!r}: true or false is expected.")
        return words[text.lower()]
    if get_origin(hint) is tuple:
        if get_args(hint)[0] is str:
            return tuple(_split_outside_brackets(text))
        return tuple(_from_string(name, part, float) for part in text.split(":"))
    try:
        return hint(text)
    except ValueError:
        kind = "a whole number" if hint is int else "a number"
        raise ValueError(f"{name}={text!r}: {kind} is expected.") from None


def _split_outside_brackets(text: str) -> list[str]:
    """Split at each ``|`` that stands outside (), [] and {}: inside, it belongs to the regex."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if index and text[index - 1] == "\\":
            continue  # escaped
        depth += (character in "([{") - (character in ")]}")
        if character == "|" and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def plain(value: Any) -> Any:
    """The value in a type that ``torch.load(weights_only=True)`` reads.

    Raises:
        TypeError: There is none.
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
    """The value in its declared type; int passes for float and a list for a tuple."""
    options = get_args(hint)
    with contextlib.suppress(TypeError):
        value = plain(value)
    if type(None) in options:
        if value is None:
            return None
        hint = next(arg for arg in options if arg is not type(None))
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        allowed = ", ".join(map(repr, get_args(hint)))
        near = difflib.get_close_matches(str(value), get_args(hint), n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is not one of {allowed}.{suggestion}")
    if get_origin(hint) is tuple:
        return _typed_tuple(name, value, get_args(hint))
    if hint in _NUMBERS and isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool):
        value = hint(value)  # an int where a float is expected; NumPy's scalars
    if type(value) is not hint:
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; {_KIND[hint]}.")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not finite.")
    return value


_NUMBERS = {float: numbers.Real, int: numbers.Integral}
_KIND = {
    bool: "True or False is expected",
    int: "a whole number is expected",
    float: "a number is expected",
    str: "a string is expected",
}


def _typed_tuple(name: str, value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}={value!r}: a tuple of {hints[0].__name__} values is expected.")
    if hints[-1] is not Ellipsis and len(value) != len(hints):
        raise ValueError(f"{name}={value!r}: {len(hints)} values are expected.")
    return tuple(typed(name, item, hints[0]) for item in value)
