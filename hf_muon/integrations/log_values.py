"""Other components' values in the Trainer's logs.

In: an optimizer and values to log. Out: the values, which a callback adds to the next record. That
callback runs before the reporters (TensorBoard, W&B, trackio); a callback that a user passes would
run after them.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

_waiting: WeakKeyDictionary[Any, dict[str, float]] = WeakKeyDictionary()


def log_with_next(optimizer: Any, values: dict[str, float]) -> None:
    """Store values for the next record of the run with this optimizer, wrapped or not."""
    _waiting.setdefault(_inmost(optimizer), {}).update(values)


def take_waiting(optimizer: Any) -> dict[str, float]:
    """Return the stored values and clear them."""
    return {} if optimizer is None else _waiting.pop(_inmost(optimizer), {})


def _inmost(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate and DeepSpeed."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer
