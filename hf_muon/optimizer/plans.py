"""Where the matrices of a group are, and the buckets in which they are trained; found once.

In: a param group and its entries. Out: the plan of a step. What is found is kept, since shapes and
places stay the same from step to step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_muon.distributed.buckets import Bucket, plan_buckets
from hf_muon.distributed.find import compute_device, find_layout, is_dtensor
from hf_muon.distributed.layout import ALONE, Layout, Matrix, Ranks
from hf_muon.distributed.owners import owning_pays
from hf_muon.optimizer.entries import Entry
from hf_muon.optimizer.pairs import moves_pairs, partners, teams
from hf_muon.optimizer.step import wire_dtype

Group = dict[str, Any]

# The settings of a group that a plan follows from.
_PLANNED_BY = (
    "bucket_mb",
    "distribute",
    "polar_method",
    "polar_dtype",
    "polar_steps",
    "lora_update",
)


class Plans:
    """Layouts and buckets of the sets of tensors that were trained so far."""

    def __init__(self) -> None:
        self._layouts: dict[Any, Layout] = {}
        self._buckets: dict[Any, list[Bucket]] = {}

    def buckets(self, group: Group, entries: list[Entry], replicate: Ranks) -> list[Bucket]:
        """The buckets of a step on some tensors of a group; ``replicate`` holds copies."""
        settings = tuple(group[name] for name in _PLANNED_BY)
        key = (tuple(entries), replicate, id(replicate.group), settings)
        if key not in self._buckets:
            self._buckets[key] = self._planned(group, entries, replicate)
        return self._buckets[key]

    def _planned(self, group: Group, entries: list[Entry], replicate: Ranks) -> list[Bucket]:
        layouts = [self._layout(entry, replicate) for entry in entries]
        devices = [compute_device(entry.tensor, entry.flat is not None) for entry in entries]
        together = teams(group, entries) if moves_pairs(group) else ()
        wire = wire_dtype(group, entries[0].tensor.dtype, devices[0])
        copies = 2 if together else 1  # of pairs, the owner gets the weights as well
        limit = int(group["bucket_mb"] * 2**20 / (copies * wire.itemsize))
        return plan_buckets(layouts, devices, limit, together)

    def _layout(self, entry: Entry, replicate: Ranks) -> Layout:
        """Where the matrices of a tensor are; found once for each kind of tensor."""
        tensor, inside = entry.tensor, entry.group["matrices"]
        if entry.flat is not None:
            if entry.flat not in self._layouts:
                of_all = [[Matrix(*matrix) for matrix in part] for part in inside]
                self._layouts[entry.flat] = entry.flat.layout(of_all)
            return self._layouts[entry.flat]
        placing = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None
        has_copies = placing is not None or replicate.size > 1
        divides = has_copies and _divides(entry)
        shape, matrices = tuple(tensor.shape), inside[entry.indices[0]]
        key = (shape, placing, matrices, divides, replicate, id(replicate.group))
        if key not in self._layouts:
            found = find_layout(tensor, entry.matrices, entry.name, replicate)
            self._layouts[key] = found if divides else dataclasses.replace(found, replicate=ALONE)
        return self._layouts[key]


def _divides(entry: Entry) -> bool:
    """Whether ranks that hold copies divide the work on a tensor among them."""
    group, matrices = entry.group, entry.matrices
    if group["distribute"] != "auto" or not matrices:
        return bool(group["distribute"] != "redundant")
    device = compute_device(entry.tensor, entry.flat is not None)
    itemsize = wire_dtype(group, entry.tensor.dtype, device).itemsize
    together = [matrices[0]]
    if moves_pairs(group):  # the same answer for both factors
        partner = partners(group)[entry.indices[0]]
        together.append(Matrix(*group["matrices"][partner][0]))
    return any(
        owning_pays(matrix.rows, matrix.cols, group["polar_steps"], itemsize, device.type)
        for matrix in together
    )
