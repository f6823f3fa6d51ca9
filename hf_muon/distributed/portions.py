"""Elementwise work in portions, so that all of it happens while the entries are in the cache.

In: the shapes of tensors, each with a key. Out: portions. Large tensors are cut between rows; small
ones with the same key share a portion, so that one foreach call serves many of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hf_muon.polar import devices

_T = TypeVar("_T")


def portion_elements(device: torch.device) -> int:
    """Return the most elements of a portion, unless one row has more.

    On a CPU that is half a megabyte of float32, which fits the cache; elsewhere 512 MiB, because
    each foreach call costs the host a launch, however many elements it has.
    """
    return 2**17 if devices.is_cpu(device) else 2**27


class Portion(NamedTuple):
    """Some tensors of a list, or some rows of one tensor.

    Attributes:
        key: The key that they share.
        places: Their positions in the list.
        rows: The rows of the only tensor; None for all rows of each.
    """

    key: Any
    places: tuple[int, ...]
    rows: slice | None = None

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this portion of a list of tensors."""
        if self.rows is None:
            return [tensors[place] for place in self.places]
        return [tensors[self.places[0]][self.rows]]

    def each(self, values: Sequence[_T]) -> list[_T]:
        """Return the values of its tensors, from a list aligned with the tensors."""
        return [values[place] for place in self.places]


def portions(
    keys: Sequence[Hashable],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    cut: bool = True,
) -> list[Portion]:
    """Return the portions that tensors are cut or joined into.

    Args:
        keys: One for each tensor; only tensors with the same key share a portion.
        shapes: (rows, cols) of each.
        device: Where they are.
        cut: Whether large tensors are cut.
    """
    limit, found = portion_elements(device), []
    alike: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        alike.setdefault(key, []).append(place)
    for key, places in alike.items():
        joined: list[int] = []
        filled = 0
        for place in places:
            rows, cols = shapes[place]
            if cut and rows * cols > limit:
                height = max(1, limit // cols)
                slices = [slice(start, start + height) for start in range(0, rows, height)]
                found += [Portion(key, (place,), rows) for rows in slices]
                continue
            if joined and filled + rows * cols > limit:
                found.append(Portion(key, tuple(joined)))
                joined, filled = [], 0
            joined.append(place)
            filled += rows * cols
        if joined:
            found.append(Portion(key, tuple(joined)))
    return found
