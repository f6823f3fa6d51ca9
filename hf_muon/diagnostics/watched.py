"""Which matrices of a step are watched, and how they are brought together.

In: a Muon optimizer inside a call of its ``step()``, and names. Out: for each group of that call,
the tensors that contain the named matrices, and the buckets in which their pieces travel. A call
may train all groups, one of them (DeepSpeed ZeRO-1 and 2), or a part of one (ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_muon.diagnostics.gradients import matching, names_of, spread_evenly
from hf_muon.diagnostics.whole import some_of
from hf_muon.distributed.buckets import Bucket, Unit, plan_buckets
from hf_muon.distributed.find import replicate_ranks
from hf_muon.distributed.layout import Matrix, Piece, Ranks
from hf_muon.optimizer import Muon
from hf_muon.optimizer.entries import Entry, Group

# How many elements of whole matrices, of each kind, a rank gathers at a time.
_LIMIT = 2**24


def matrix_names(group: Group) -> list[list[str]]:
    """Name each matrix of each parameter of a group."""
    inside = group["matrices"]
    unnamed = [f"group {group['group_id']} parameter {index}" for index in range(len(inside))]
    names = group.get("param_names", unnamed)
    return [names_of(name, matrices) for name, matrices in zip(names, inside, strict=True)]


def chosen_matrices(
    optimizer: Muon, layers: str | Sequence[str] | None, most: int
) -> dict[str, list[int]]:
    """Return names and shapes (m, n) of the matrices to watch.

    Args:
        optimizer: The optimizer that trains them.
        layers: Regexes, one of which must match in the name; None for ``most`` matrices, spread
            evenly over the model.
        most: How many matrices if ``layers`` is None.

    Raises:
        ValueError: A pattern matches no matrix.
    """
    every = {
        name: [matrix.rows, matrix.cols]
        for group in optimizer.param_groups
        if group["algorithm"] == "muon"
        for names, inside in zip(matrix_names(group), group["matrices"], strict=True)
        for name, matrix in zip(names, (Matrix(*one) for one in inside), strict=True)
    }
    names = matching(every, layers)
    if layers is None:
        names = spread_evenly(names, most)
    return {name: every[name] for name in names}


@dataclass(frozen=True, eq=False)
class Watched:
    """The watched matrices of one group in one call of ``step()``.

    Attributes:
        entries: The tensors that contain them.
        names: Names of the watched matrices in each of these tensors.
        buckets: How they are brought together; ``unit.parameter`` and ``unit.matrix`` are
            positions in ``names``.
    """

    entries: list[Entry]
    names: list[list[str]]
    buckets: list[Bucket]

    @property
    def group(self) -> Group:
        """Their param group."""
        return self.entries[0].group

    def name(self, unit: Unit) -> str:
        """Return the name of a matrix."""
        return self.names[unit.parameter][unit.matrix]

    def pieces(self) -> Iterator[tuple[Unit, Piece]]:
        """Yield the pieces that this rank reads."""
        for bucket in self.buckets:
            yield from bucket.reads


class Watch:
    """Finds named matrices in the calls of ``step()``.

    Args:
        optimizer: The optimizer to watch.
        names: From :func:`matrix_names`.
    """

    def __init__(self, optimizer: Muon, names: Sequence[str]) -> None:
        self._optimizer = optimizer
        self._names = frozenset(names)
        self._buckets: dict[Any, list[Bucket]] = {}

    def call(self) -> Iterator[Watched]:
        """Yield what the current call trains of them, group by group."""
        # DeepSpeed's tensors are described by the parameters that the groups were built from.
        origins, groups = self._optimizer._origins, self._optimizer.param_groups
        replicate = replicate_ranks(self._optimizer.replicate_group)
        for entries in origins.entries(groups):
            if entries and entries[0].group["algorithm"] == "muon":
                watched = self._watched(entries, replicate)
                if watched.entries:
                    yield watched

    def _watched(self, entries: list[Entry], replicate: Ranks) -> Watched:
        of_group = matrix_names(entries[0].group)
        kept, names, places = [], [], []
        for entry in entries:
            inside = [name for index in entry.indices for name in of_group[index]]
            numbers = [number for number, name in enumerate(inside) if name in self._names]
            if numbers:
                kept.append(entry)
                names.append([inside[number] for number in numbers])
                places.append(numbers)
        # Matrices stay where they are, so buckets are made once.
        key = tuple(map(tuple, names))
        if key not in self._buckets:
            some = [some_of(e.layout(replicate), n) for e, n in zip(kept, places, strict=True)]
            devices = [entry.device for entry in kept]
            self._buckets[key] = plan_buckets(some, devices, _LIMIT)
        return Watched(kept, names, self._buckets[key])
