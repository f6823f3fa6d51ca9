"""The tensors in param groups: the model's parameters, their shards, or several in one tensor.

In: param groups as a launcher left them. Out: an :class:`Entry` for each tensor, with the names and
matrices of what it holds. Launchers replace the parameters that an optimizer was built from: FSDP2
by DTensors, DeepSpeed by copies (stage 0) or by flat tensors that hold parts of many parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from hf_muon.distributed.find import compute_device, find_layout, is_dtensor
from hf_muon.distributed.layout import Layout, Matrix, Ranks
from hf_muon.distributed.zero import FlatTensor, find_flat, is_flattened

Group = dict[str, Any]
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of a param group.

    Attributes:
        group: Its param group.
        tensor: The tensor that the optimizer trains.
        indices: Positions in the group, when it was built, of the parameters that it holds.
        flat: Where they are in it, if it is a flat tensor of DeepSpeed.
        is_copy: Whether it is a whole copy of the model's parameter, made by a launcher.
    """

    group: Group
    tensor: Tensor
    indices: tuple[int, ...]
    flat: FlatTensor | None = None
    is_copy: bool = False

    @property
    def name(self) -> str:
        """The names of its parameters, or position and shape if the group has no names."""
        names = [self._name(index) for index in self.indices]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    @cached_property
    def matrices(self) -> list[Matrix]:
        """The matrices in it, one parameter after the other."""
        inside = self.group["matrices"]
        return [Matrix(*matrix) for index in self.indices for matrix in inside[index]]

    @property
    def device(self) -> torch.device:
        """Where its matrices are computed."""
        return compute_device(self.tensor, self.flat is not None)

    @property
    def owners(self) -> list[str]:
        """The name of the parameter that each of :attr:`matrices` belongs to."""
        inside = self.group["matrices"]
        return [self._name(index) for index in self.indices for _ in inside[index]]

    def layout(self, replicate: Ranks) -> Layout:
        """Return where its matrices are; ranks of ``replicate`` hold copies of plain tensors."""
        if self.flat is not None:
            return self.flat.layout(self.group["matrices"])
        return find_layout(self.tensor, self.matrices, self.name, replicate)

    def each(self, values: Sequence[_T]) -> list[_T]:
        """Return the value for each of :attr:`matrices`, given one per parameter of the group."""
        inside = self.group["matrices"]
        return [values[index] for index in self.indices for _ in inside[index]]

    def parts(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter that this rank has a part of: its name, and its part of a tensor."""
        if self.flat is None:
            yield self.name, values
            return
        for span in self.flat.held:
            yield self._name(span.parameter), values[span.offset :][: span.stop - span.start]

    def _name(self, index: int) -> str:
        if "param_names" in self.group:
            return str(self.group["param_names"][index])
        return f"parameter {index} of shape {tuple(self.tensor.shape)}"


def trained_of(entries: Iterable[Entry]) -> list[Entry]:
    """Return those whose plain tensors are trained, or were until they got their gradients."""
    # Without a call for each, because every step asks.
    return [one for one in entries if one.tensor.requires_grad or one.tensor.grad is not None]


class Origins:
    """The parameters that the groups were built from, which launchers may have replaced.

    DeepSpeed records on them where their parts are. The references are weak: under FSDP2, strong
    ones would keep the unsharded model in memory.
    """

    def __init__(self) -> None:
        self._groups: list[list[TensorWeakRef]] = []
        # By the id of a tensor; the entry keeps the tensor alive.
        self._flats: dict[int, Entry] = {}
        self._entries: dict[int, tuple[list[Entry], Group | None]] = {}

    def add_group(self, parameters: Iterable[Tensor]) -> None:
        """Remember the parameters of a further group; its ``group_id`` counts the earlier ones."""
        self._groups.append([TensorWeakRef(parameter) for parameter in parameters])

    def forget_flats(self) -> None:
        """Look for flat tensors again, because a checkpoint was loaded."""
        self._flats, self._entries = {}, {}

    @property
    def are_flattened(self) -> bool:
        """Whether DeepSpeed has flattened the parameters."""
        first = self._groups[0][0]() if self._groups else None
        return first is not None and is_flattened([first])

    def entries(self, groups: list[Group]) -> list[list[Entry]]:
        """Return one entry for each tensor of each group; the same ones while the tensors stay.

        Under ZeRO it communicates with the other ranks when it first meets a flat tensor.

        Args:
            groups: All groups, or one of them, as DeepSpeed's stages 1 and 2 step.
        """
        return [self._of_group(group) for group in groups]

    def _of_group(self, group: Group) -> list[Entry]:
        entries, of_group = self._entries.get(group["group_id"], ([], None))
        tensors = group["params"]
        same = of_group is group and len(entries) == len(tensors)
        if same and all(map(is_, [entry.tensor for entry in entries], tensors)):
            return entries
        found = self._found(group)
        self._entries[group["group_id"]] = found, group
        return found

    def _found(self, group: Group) -> list[Entry]:
        origins = [reference() for reference in self._groups[group["group_id"]]]
        if self.are_flattened:
            return [self._of_flat(group, tensor, origins) for tensor in group["params"]]
        if len(origins) != len(group["params"]):  # the user has changed the group
            origins = [None] * len(group["params"])
        return [
            Entry(group, tensor, (index,), is_copy=_is_copy(tensor, origin))
            for index, (tensor, origin) in enumerate(zip(group["params"], origins, strict=True))
        ]

    def _of_flat(self, group: Group, tensor: Tensor, origins: list[Tensor | None]) -> Entry:
        if id(tensor) not in self._flats:
            parameters = [parameter for parameter in origins if parameter is not None]
            if len(parameters) < len(origins):
                raise ValueError(
                    "Some parameters of the model that DeepSpeed has flattened are gone, so that "
                    "their matrices cannot be found. Keep the model that the optimizer was built "
                    "from."
                )
            flat = find_flat(tensor, parameters)
            self._flats[id(tensor)] = Entry(group, tensor, flat.parameters, flat)
        return self._flats[id(tensor)]


def _is_copy(tensor: Tensor, origin: Tensor | None) -> bool:
    return origin is not None and origin is not tensor and not is_dtensor(tensor)
