"""Values of others in the Trainer's logs.

In: an optimizer and values that should be logged. Out: the values, taken by the callback that adds
them to the next record. It runs ahead of the reporters (TensorBoard, W&B, trackio), which a
callback that a user passes does not.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

_waiting: WeakKeyDictionary[Any, dict[str, float]] = WeakKeyDictionary()


def log_with_next(optimizer: Any, values: dict[str, float]) -> None:
    """Leave values for the next record of the run that an optimizer trains, wrapped or not."""
    _waiting.setdefault(_inmost(optimizer), {}).update(values)


def take_waiting(optimizer: Any) -> dict[str, float]:
    """The values that were left; none of them is given twice."""
    return {} if optimizer is None else _waiting.pop(_inmost(optimizer), {})


def _inmost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer
