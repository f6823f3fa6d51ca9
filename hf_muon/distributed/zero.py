"""Layouts of DeepSpeed's flat tensors: ZeRO 1, 2 and 3, and its bfloat16 optimizer.

In: a flat tensor and the model's parameters of its param group. DeepSpeed (0.19) flattens them,
gives each rank a part, and records on the parameters themselves where it went. Out: the spans of
parameters that each rank's flat tensor holds, and from them a :class:`Layout`. Reads DeepSpeed's
attributes, and never imports it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.layout import ALONE, Layout, Matrix, Ranks, pieces_in_range, ranks_of


class Span(NamedTuple):
    """Elements [start, stop) of a row-major parameter, at ``offset`` in a flat tensor."""

    parameter: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, eq=False)
class FlatTensor:
    """The contents of a flat tensor.

    Attributes:
        parameters: Positions in the param group of the parameters that are flattened into it.
        spans: For each rank, what its flat tensor holds of them.
        ranks: The ranks that together hold all of them.
    """

    parameters: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    ranks: Ranks

    @property
    def held(self) -> tuple[Span, ...]:
        """The spans that this rank holds."""
        return self.spans[self.ranks.index]

    def layout(self, matrices: Sequence[Sequence[Any]]) -> Layout:
        """Return the layout of all matrices, in the order of :attr:`parameters`.

        Args:
            matrices: Those of every parameter of the param group, as tuples.
        """
        places = [(n, Matrix(*matrix)) for n in self.parameters for matrix in matrices[n]]

        def pieces(spans: Sequence[Span]) -> Any:
            of: dict[int, list[Span]] = defaultdict(list)
            for span in spans:
                of[span.parameter].append(span)
            return tuple(
                tuple(
                    piece
                    for span in of.get(number, ())
                    for piece in pieces_in_range(matrix, span.start, span.stop, span.offset)
                )
                for number, matrix in places
            )

        return Layout(
            shapes=tuple((matrix.rows, matrix.cols) for _, matrix in places),
            pieces=tuple(map(pieces, self.spans)),
            shard=self.ranks,
            replicate=ALONE,
            holders_own=False,
        )


def is_flattened(parameters: Sequence[Tensor]) -> bool:
    """Whether DeepSpeed has flattened these model parameters."""
    return any(hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping") for p in parameters)


def find_flat(flat: Tensor, parameters: Sequence[Any]) -> FlatTensor:
    """Return what every rank's flat tensor holds; all ranks that share the parameters must call it.

    Args:
        flat: The tensor in the optimizer's param group.
        parameters: The model's parameters of that group.

    Raises:
        ValueError: On all ranks: DeepSpeed runs in a mode that is not supported, or its records do
            not say where the parameters are.
    """
    _refuse_other_parallelism(parameters)
    if hasattr(parameters[0], "_z3_optimizer"):
        members, group, spans = _partitions(flat, parameters)
        right = True
    else:
        members, group = tuple(range(len(parameters))), parameters[0]._dp_group
        spans = _fragments(parameters)
        right = all(_holds(flat, span, parameters[span.parameter]) for span in spans)
    ranks = ranks_of(group)
    described: list[Any] = [(spans, right)]
    if ranks.size > 1:
        described = [None] * ranks.size
        dist.all_gather_object(described, (spans, right), group=group)
    if not all(right for _, right in described):
        raise ValueError(
            "DeepSpeed's map of its flat tensors does not fit what they hold, so that the matrices "
            "cannot be found. Remove 'round_robin_gradients' from the zero_optimization section "
            "of its config, under which the map is wrong (seen in DeepSpeed 0.19)."
        )
    flat_tensor = FlatTensor(members, tuple(spans for spans, _ in described), ranks)
    _check_complete(flat_tensor, parameters)
    return flat_tensor


def _check_complete(flat: FlatTensor, parameters: Sequence[Any]) -> None:
    """Raise, on all ranks, unless the spans cover each element of each parameter exactly once."""
    spans: dict[int, list[Span]] = {number: [] for number in flat.parameters}
    for span in chain.from_iterable(flat.spans):
        spans[span.parameter].append(span)
    for number, of_one in spans.items():
        parameter, end = parameters[number], 0
        for span in sorted(of_one, key=lambda span: span.start):
            end = span.stop if span.start == end else -1
        if end != getattr(parameter, "ds_numel", parameter.numel()):
            raise ValueError(
                f"The parts of parameter {number} of a group that DeepSpeed's ranks hold do not "
                "make it up, so that its matrices cannot be brought together. This release of "
                "DeepSpeed may keep its map elsewhere; 0.19.8 was tested."
            )


def _partitions(
    flat: Tensor, parameters: Sequence[Any]
) -> tuple[tuple[int, ...], Any, tuple[Span, ...]]:
    """Stage 3: each parameter is cut into equal parts; a rank's flat tensor holds one of each."""
    zero = parameters[0]._z3_optimizer
    if getattr(zero, "swap_optimizer", False):
        raise ValueError(
            "DeepSpeed keeps optimizer state on NVMe, where Muon cannot reach it. Use "
            "offload_optimizer with device 'cpu', or none."
        )
    flats = zero.fp32_partitioned_groups_flat
    number = next((i for i, other in enumerate(flats) if other is flat), None)
    if number is None:
        raise ValueError(
            "A flat tensor in the optimizer is none of DeepSpeed's ZeRO-3 partitions: Muon cannot "
            "find its matrices."
        )
    position = {id(p): index for index, p in enumerate(parameters)}
    group = zero.sub_group_process_groups[number]
    rank, offset = dist.get_rank(group), 0
    members, spans = [], []
    for parameter in zero.fp16_groups[number]:
        index, width = position[id(parameter)], parameter.partition_numel()
        start = min(rank * width, parameter.ds_numel)
        stop = min(start + width, parameter.ds_numel)
        members.append(index)
        if start < stop:
            spans.append(Span(index, start, stop, offset))
        offset += width
    return tuple(members), group, tuple(spans)


def _fragments(parameters: Sequence[Any]) -> tuple[Span, ...]:
    """Stages 1 and 2: all parameters are concatenated; a rank's flat tensor holds one stretch."""
    spans = []
    for index, parameter in enumerate(parameters):
        if parameter._hp_mapping is not None:
            here = parameter._hp_mapping.lp_fragment_address
            there = parameter._hp_mapping.hp_fragment_address
            spans.append(Span(index, here.start, here.start + here.numel, there.start))
    return tuple(spans)


def _holds(flat: Tensor, span: Span, parameter: Tensor) -> bool:
    """Whether a flat tensor's values agree with the parameter where the records say."""
    master = flat.detach().narrow(0, span.offset, span.stop - span.start)
    weight = parameter.detach().flatten()[span.start : span.stop]
    return torch.equal(master.to(weight.device, weight.dtype), weight)


def _refuse_other_parallelism(parameters: Sequence[Any]) -> None:
    for parameter in parameters:
        if getattr(parameter, "tensor_model_parallel", getattr(parameter, "model_parallel", False)):
            raise ValueError(
                "DeepSpeed has cut matrices for tensor parallelism, and Muon does not know how. "
                "Use FSDP2 with tensor parallelism, or ZeRO without it."
            )
        if getattr(parameter, "allreduce", True) is False:
            raise ValueError(
                "DeepSpeed trains experts on groups of their own (MoE), and Muon does not know "
                "these groups. Use FSDP2, or ZeRO without expert parallelism."
            )
