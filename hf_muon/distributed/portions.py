"""Elementwise work in portions: whatever happens to some entries happens while they are cached.

In: rows of tensors of one shape. Out: the same entries as lists of tensors; large matrices are cut
between their rows, small ones share a portion, so that a call on a list serves many of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def portion_elements(device: torch.device) -> int:
    """The most elements of a portion, unless one row has more.

    On a CPU half a megabyte of float32; elsewhere 16, for which a kernel takes longer than its
    launch.
    """
    return 2**17 if device.type == "cpu" else 2**22


def portions(
    rows: Iterable[tuple[Key, Sequence[Tensor]]],
) -> Iterator[tuple[Key, list[list[Tensor]]]]:
    """Cut and join.

    Args:
        rows: Each with a key, and tensors (m, n) that belong together, entry by entry.

    Yields:
        A key, and a list of tensors for each place in its rows, in their order. Only rows that
        follow each other with the same key are in one portion.
    """
    for key, alike in groupby(rows, key=itemgetter(0)):
        portion: list[Sequence[Tensor]] = []
        filled = 0
        for _, tensors in alike:
            numel = tensors[0].numel()
            limit = portion_elements(tensors[0].device)
            if numel > limit:
                height = max(1, limit // tensors[0].shape[-1])
                for parts in zip(*(torch.split(one, height) for one in tensors), strict=True):
                    yield key, _columns([parts])
                continue
            if portion and filled + numel > limit:
                yield key, _columns(portion)
                portion, filled = [], 0
            portion.append(tensors)
            filled += numel
        if portion:
            yield key, _columns(portion)


def _columns(portion: list[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*portion, strict=True)]
