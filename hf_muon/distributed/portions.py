"""Elementwise work in portions: whatever happens to some entries happens while they are cached.

In: the shapes of tensors, each with a key. Out: portions; large tensors are cut between their rows,
small ones with one key share a portion, so that a call on a list serves many of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hf_muon.polar import devices

_T = TypeVar("_T")


def portion_elements(device: torch.device) -> int:
    """The most elements of a portion, unless one row has more.

    On a CPU half a megabyte of float32, which its cache holds; elsewhere 512, because each list
    costs the host as much as a launch, whatever is in it.
    """
    return 2**17 if devices.is_cpu(device) else 2**27


class Portion(NamedTuple):
    """Some tensors of a list, or rows of one.

    Attributes:
        key: What they have in common.
        places: Their places in the list.
        rows: Which rows of the only tensor; None for all of each.
    """

    key: Any
    places: tuple[int, ...]
    rows: slice | None = None

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The portion of a list of tensors."""
        if self.rows is None:
            return [tensors[place] for place in self.places]
        return [tensors[self.places[0]][self.rows]]

    def each(self, values: Sequence[_T]) -> list[_T]:
        """What belongs to each of its tensors, from a list that is aligned with theirs."""
        return [values[place] for place in self.places]


def portions(
    keys: Sequence[Hashable],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    cut: bool = True,
) -> list[Portion]:
    """Cut and join.

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
