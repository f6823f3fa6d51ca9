"""Layouts of ranks that do not exist, to see a plan before running it.

In: the matrices of some parameters, a kind of sharding, a number of ranks. Out: the layouts that
those ranks would find, and the buckets that a step would plan. No process group is needed: this
module reproduces how each library cuts a parameter, and tests compare it with the library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from hf_muon.config import MuonConfig
from hf_muon.distributed.buckets import Bucket, bucket_elements, plan_buckets
from hf_muon.distributed.layout import Layout, Matrix, Ranks, pieces_in_box
from hf_muon.distributed.owners import owning_pays
from hf_muon.distributed.zero import FlatTensor, Span
from hf_muon.optimizer.step import returned_dtype, wire_dtype
from hf_muon.values import require_one_of

KINDS = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")

# DeepSpeed 0.19.8: ZeRO-1/2 pads a flat group to a multiple of FLAT_ALIGNMENT times the number of
# ranks (nccl_start_alignment_factor). ZeRO-3 steps through sub-groups of SUB_GROUP_SIZE elements
# per rank (the default of sub_group_size).
FLAT_ALIGNMENT = 2
SUB_GROUP_SIZE = 10**9


class Parameter(NamedTuple):
    """A whole parameter: its shape and the matrices inside it."""

    shape: tuple[int, ...]
    matrices: tuple[Matrix, ...]

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class World:
    """Ranks that train one model together.

    Attributes:
        kind: One of :data:`KINDS`.
        ranks: Number of ranks.
        replicas: ``hsdp`` only: number of groups of ranks that each hold the whole model. Rank r is
            member r mod (ranks/replicas) of replica ⌊r·replicas/ranks⌋, as in a device mesh
            (replicas, shards).

    Raises:
        ValueError: The kind is unknown, or the numbers do not fit it.
    """

    kind: str
    ranks: int
    replicas: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_one_of("layout", self.kind, KINDS)
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks}: at least one is needed.")
        if self.kind != "hsdp" and self.replicas is not None:
            raise ValueError(f"replicas={self.replicas} with layout={self.kind!r}: only for hsdp.")
        if self.kind == "hsdp" and (not self.replicas or self.replicas < 1):
            raise ValueError("layout='hsdp' needs replicas, the number of copies of the model.")
        if self.kind == "hsdp" and self.ranks % (self.replicas or 1):
            raise ValueError(f"replicas={self.replicas} does not divide ranks={self.ranks}.")

    @property
    def mesh(self) -> tuple[int, int]:
        """(replicas, shards): the number of copies, and of the ranks that share each copy."""
        replicas = {"ddp": self.ranks, "hsdp": self.replicas or 1}.get(self.kind, 1)
        return replicas, self.ranks // replicas


def exchanges(
    parameters: Sequence[Parameter], shares: Sequence[bool], world: World
) -> list[list[Layout]]:
    """Return the layouts of one param group, in the lists that a step plans one after another.

    Args:
        parameters: All parameters of the group.
        shares: For each parameter, whether ranks that hold copies divide the work on it.
        world: The ranks.

    Returns:
        One list with a layout for each parameter. Under ZeRO, a list with a single layout for each
        flat tensor, because DeepSpeed calls the optimizer once per flat tensor.
    """
    matrices = [parameter.matrices for parameter in parameters]
    if world.kind == "zero3":
        groups = _sub_groups(parameters, world.ranks)
        flats = [_flat_slices(parameters, members, world.ranks) for members in groups]
        return [[flat.layout(matrices)] for flat in flats]
    if world.kind in ("zero1", "zero2"):
        return [[_flat_partitions(parameters, world.ranks).layout(matrices)]]
    return [
        [
            _rows_of_a_mesh(parameter, *(world.mesh if share else (1, world.mesh[1])))
            for parameter, share in zip(parameters, shares, strict=True)
        ]
    ]


def planned(
    groups: Sequence[Sequence[Parameter]],
    config: MuonConfig,
    world: World,
    wire: torch.dtype,
    device_type: str,
) -> Iterator[list[Bucket]]:
    """Yield the buckets of a step, in the lists that run one after another.

    The groups are those of Muon, in the optimizer's order.
    """
    limit, alone = bucket_elements(config.bucket_mb, wire.itemsize)
    device = torch.device(device_type)
    for group in groups:
        shares = [_shares(parameter, config, wire, device_type) for parameter in group]
        for layouts in exchanges(group, shares, world):
            buckets = plan_buckets(layouts, [device] * len(layouts), limit, alone=alone)
            if buckets:
                yield buckets


def wires_of(
    config: MuonConfig, dtype: torch.dtype, device_type: str
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes on the wire, to the owner and back, without access to the device.

    ``cuda`` is assumed to have instructions for bfloat16; ``cpu`` is this one.
    """
    requested = config.polar_dtype
    if device_type == "cuda" and requested == "auto" and config.polar_method != "svd":
        requested = "bfloat16"
    settings = {**config.to_dict(), "polar_dtype": requested}
    place = torch.device("cpu" if device_type == "cpu" else "meta")
    wire = wire_dtype(settings, dtype, place)
    return wire, returned_dtype(settings, wire, place)


def _shares(parameter: Parameter, config: MuonConfig, wire: torch.dtype, device_type: str) -> bool:
    """Return whether ranks that hold copies of a parameter divide the work on it."""
    if config.distribute != "auto" or not parameter.matrices:
        return config.distribute != "redundant"
    matrix = parameter.matrices[0]
    return owning_pays(matrix.rows, matrix.cols, config.polar_steps, wire.itemsize, device_type)


@lru_cache(maxsize=1024)
def _rows_of_a_mesh(parameter: Parameter, replicas: int, shards: int) -> Layout:
    """Return the layout (Replicate, Shard(0)) on a mesh; ``torch.chunk`` cuts the rows."""
    rows, *others = parameter.shape
    chunk = -(-rows // shards)
    pieces = []
    for member in range(shards):
        start, stop = (min(rows, place * chunk) for place in (member, member + 1))
        ranges = [(start, stop), *((0, size) for size in others)]
        held = [torch.arange(*ends, device="cpu") for ends in ranges]
        pieces.append(
            tuple(pieces_in_box(matrix, parameter.shape, held) for matrix in parameter.matrices)
        )
    shard = Ranks(tuple(range(shards)))
    replicate = Ranks(tuple(range(0, replicas * shards, shards)))
    shapes = tuple((matrix.rows, matrix.cols) for matrix in parameter.matrices)
    return Layout(shapes, tuple(pieces), shard, replicate)


def _flat_partitions(parameters: Sequence[Parameter], ranks: int) -> FlatTensor:
    """Lay out a group under ZeRO-1/2: one vector in equal parts, whose cuts may split matrices."""
    offsets = [0, *accumulate(parameter.numel for parameter in parameters)]
    size = -(-offsets[-1] // (FLAT_ALIGNMENT * ranks)) * FLAT_ALIGNMENT
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    for index, (first, end) in enumerate(pairwise(offsets)):
        for rank in range(first // size, -(-end // size)):
            start, stop = max(first, rank * size), min(end, (rank + 1) * size)
            spans[rank].append(Span(index, start - first, stop - first, start - rank * size))
    return _flat_tensor(range(len(parameters)), spans)


def _sub_groups(parameters: Sequence[Parameter], ranks: int) -> list[list[int]]:
    """Group parameters under ZeRO-3; a sub-group ends with the parameter that reaches its size."""
    groups: list[list[int]] = [[]]
    size = 0
    for index, parameter in enumerate(parameters):
        if size >= SUB_GROUP_SIZE:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += -(-parameter.numel // ranks)
    return groups


def _flat_slices(parameters: Sequence[Parameter], members: list[int], ranks: int) -> FlatTensor:
    """Lay out a sub-group under ZeRO-3: each rank holds an equal part of every parameter."""
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    offset = 0
    for index in members:
        numel = parameters[index].numel
        size = -(-numel // ranks)
        for rank in range(-(-numel // size)):
            spans[rank].append(Span(index, rank * size, min(numel, (rank + 1) * size), offset))
        offset += size
    return _flat_tensor(members, spans)


def _flat_tensor(members: Iterable[int], spans: list[list[Span]]) -> FlatTensor:
    ranks = Ranks(tuple(range(len(spans))))
    return FlatTensor(tuple(members), tuple(map(tuple, spans)), ranks)
