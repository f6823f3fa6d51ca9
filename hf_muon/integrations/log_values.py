"""Values of others in the Trainer's logs.

In: an optimizer and values that should be logged. Out: the values, taken by the callback that adds
them to the next record. It runs ahead of the reporters (TensorBoard, W&B, trackio), which a
callback that a user passes does not.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from hf_muon.optimizer import Muon

_waiting: WeakKeyDictionary[Muon, dict[str, float]] = WeakKeyDictionary()


def log_with_next(optimizer: Muon, values: dict[str, float]) -> None:
    """Leave values for the next record of the run that an optimizer trains."""
    _waiting.setdefault(optimizer, {}).update(values)


def take_waiting(optimizer: Muon) -> dict[str, float]:
    """The values that were left; none of them is given twice."""
    return _waiting.pop(optimizer, {})
