"""Plans: where the matrices of a group are, the buckets in which they are trained, and views.

In: a param group, its entries and their state. Out: what a step follows. A plan is made once for
all tensors of a group and kept, since shapes and places stay the same from step to step; a step
that trains only some of them skips the others.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Unit, bucket_elements, plan_buckets
from hf_muon.distributed.find import is_dtensor, local_gradient, locals_of
from hf_muon.distributed.layout import ALONE, Layout, Matrix, Ranks
from hf_muon.distributed.owners import owning_pays
from hf_muon.optimizer.agreement import check_placement
from hf_muon.optimizer.auto_momentum import momenta_in_use
from hf_muon.optimizer.buffers import buffers_of, step_count
from hf_muon.optimizer.context import Step
from hf_muon.optimizer.entries import Entry, Group
from hf_muon.optimizer.held import Held
from hf_muon.optimizer.lora import pair_step_size
from hf_muon.optimizer.momentum import momentum_at
from hf_muon.optimizer.outliers import Outliers
from hf_muon.optimizer.pairs import moves_pairs, partners, teams
from hf_muon.optimizer.scaling import step_size
from hf_muon.optimizer.step import products_name, returned_dtype, wire_dtype
from hf_muon.polar import Workspace, devices
from hf_muon.rules import rule_of
from hf_muon.stages import Buffer, Momentum, Rule

State = dict[str, Any]

# The settings of a group that a plan depends on, besides its rule.
_PLANNED_BY = (
    "bucket_mb", "distribute", "polar_method", "polar_dtype", "polar_steps", "polar_kernel",
    "compile", "adjust_lr",
)  # fmt: skip


class Plan:
    """What the steps of a group have in common while nobody moves its tensors.

    Attributes:
        group: The param group.
        rule: Its update rule.
        entries: All its entries that the optimizer was given.
        buckets: Buckets of all their matrices.
        outliers: The matrices that overflow in half precision.
    """

    def __init__(self, group: Group, entries: Sequence[Entry], buckets: list[Bucket]) -> None:
        self.group, self.rule = group, rule_of(group)
        self.entries, self.buckets = entries, buckets
        self._number = {entry: number for number, entry in enumerate(entries)}
        self._sizes = _step_sizes(group, entries, buckets)
        self._states: Sequence[State] = ()
        self._weights: list[Tensor] = []
        self._kept: dict[Buffer, list[Tensor]] = {}
        self._seen: Any = None
        self._held: tuple[frozenset[int], list[Held]] = frozenset(), []
        _check_whole(self.rule, entries, buckets)
        self.outliers = Outliers()
        is_fake = any(map(devices.is_fake, locals_of([entry.tensor for entry in entries[:1]])))
        self._products = [
            products_name(group, device, is_fake)
            for device in dict.fromkeys(bucket.device for bucket in buckets)
        ]

    def refresh(self, states: Sequence[State]) -> bool:
        """Read the tensors and their state; return whether they differ from the last ones."""
        self._states = states
        for state in states:  # moving all state to the device also moves the host's step counts
            if not state["step"].is_cpu:
                state["step"] = step_count(state["step"])
        self._weights = locals_of([entry.tensor for entry in self.entries])
        self._kept = {
            buffer: locals_of([state[buffer.name] for state in states])
            for buffer in buffers_of(self.group)
        }
        # A kept view keeps its storage alive, so a new storage cannot have the same address.
        seen = [
            (t.untyped_storage()._cdata, t.storage_offset(), t.dtype, t.shape, t.stride())
            for t in chain(self._weights, *self._kept.values())
        ]
        is_new = bool(seen != self._seen)
        if is_new:
            self._seen, self._held = seen, (frozenset(), [])
        return is_new

    def held(self, trained: Sequence[Entry]) -> list[Held]:
        """Return the buckets of a step on some entries; the last result is cached."""
        numbers = frozenset(self._number[entry] for entry in trained)
        if self._held[0] != numbers:
            buckets = self.buckets
            if len(numbers) < len(self.entries):
                some = [[u for u in one.units if u.parameter in numbers] for one in buckets]
                buckets = [b.only(units) for b, units in zip(buckets, some, strict=True) if units]
            found = [Held(one, self._weights, self._kept, self._sizes) for one in buckets]
            self._held = numbers, found
        return self._held[1]

    def step(self, trained: Sequence[Entry], workspace: Workspace) -> Step:
        """Return the data of a step; entries that are not trained have no gradient in it."""
        gradients, group = list(self._weights), self.group
        for entry in trained:
            gradients[self._number[entry]] = local_gradient(entry.tensor)
        self.read_outliers()
        told = (self.momenta(), self.counts, workspace, self.outliers)
        return Step(group, self.rule, gradients, *told)

    def read_outliers(self) -> None:
        """Read the flags of earlier steps that have arrived."""
        self.outliers.read(self._name_of)

    def _name_of(self, unit: Unit) -> str:
        entry = self.entries[unit.parameter]
        several = len(entry.matrices) > 1
        return f"{entry.name}, matrix {unit.matrix}" if several else entry.name

    @property
    def counts(self) -> list[Tensor]:
        """The number of earlier steps of each entry, on the CPU."""
        return [state["step"] for state in self._states]

    @property
    def has_schedule(self) -> bool:
        """Whether β depends on the step."""
        return bool(self.group["momentum_warmup_steps"] or self.group["momentum_cooldown_steps"])

    def momenta(self, ahead: int = 0) -> list[list[Momentum]]:
        """Return β of each matrix of each entry in this step, or some steps ahead."""
        group, counts = self.group, self.counts
        if group.get("momenta"):
            return [entry.each(group["momenta"]) for entry in self.entries]
        now: list[Momentum] = [group["momentum"]] * len(counts)
        if self.has_schedule:
            now = [momentum_at(group, int(count) + ahead) for count in counts]
        pairs = zip(now, self.entries, strict=True)
        return [[momentum] * len(entry.matrices) for momentum, entry in pairs]

    def count(self, trained: Sequence[Entry]) -> None:
        """Count a step of some entries; not in place, because loaders may have shared a tensor."""
        self.outliers.send()
        states = [self._states[self._number[entry]] for entry in trained]
        counted = torch._foreach_add([state["step"] for state in states], 1)
        for state, step in zip(states, counted, strict=True):
            state["step"] = step

    def may_fail(self, trained: Sequence[Entry]) -> bool:
        """Whether a step on some of the entries may have to be undone."""
        if self.rule.may_fail or self.group["polar_method"] == "svd":  # which may not converge
            return True
        states = (self._states[self._number[entry]] for entry in trained)
        return self.rule.may_refuse and any(bool(state["step"] <= 1) for state in states)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor that a step writes, with a copy."""
        written = [*self._weights, *chain.from_iterable(self._kept.values())]
        return [(tensor, tensor.clone()) for tensor in written]

    def facts(self) -> dict[str, Any]:
        """Return what must be the same on all ranks about the matrices."""
        where = f"of muon group {self.group['group_id']}"
        owners = [
            (unit.parameter, unit.matrix, unit.shape, unit.owner)
            for bucket in self.buckets
            for unit in bucket.units
        ]
        return {
            f"wire dtype {where}": sorted({_there_and_back(bucket) for bucket in self.buckets}),
            f"products of polar factors {where}": self._products,
            f"momenta {where}": self.group.get("momenta"),
            f"matrices and owners {where}": zlib.crc32(repr(owners).encode()),
        }


def facts_of(
    groups: Iterable[Sequence[Entry]], state: Mapping[Tensor, State], plans: Iterable[Plan | None]
) -> dict[str, Any]:
    """Return what must be the same on all ranks before a step, besides the settings."""
    facts: dict[str, Any] = {}
    for entries in filter(None, groups):
        states = [state.get(entry.tensor) for entry in entries]
        where = f"of {entries[0].group['algorithm']} group {entries[0].group['group_id']}"
        facts[f"earlier steps {where}"] = sorted({int(of["step"]) for of in states if of})
        facts[f"parameters {where}"] = len(entries)
        whole = [entry for entry in entries if entry.flat is None]
        facts.update({f"shape of {one.name}": tuple(one.tensor.shape) for one in whole})
    for plan in filter(None, plans):
        facts.update(plan.facts())
    return facts


class Plans:
    """The plans of the groups of an optimizer."""

    def __init__(self) -> None:
        self._layouts: dict[Any, Layout] = {}
        self._plans: dict[Any, Plan] = {}

    def of(self, group: Group, entries: Sequence[Entry], replicate: Ranks) -> Plan:
        """Return the plan of a group; the ranks of ``replicate`` hold copies of plain tensors."""
        settings = tuple(group[name] for name in _PLANNED_BY)
        key = (tuple(entries), replicate, id(replicate.group), rule_of(group), settings)
        if key not in self._plans:
            for entry in entries:
                check_placement(entry)
            plan = Plan(group, entries, self._buckets(group, entries, replicate))
            # One plan is kept per group, or one for each of its flat tensors, which come in turn.
            self._plans = {k: p for k, p in self._plans.items() if not _replaced(p, entries)}
            self._plans[key] = plan
        return self._plans[key]

    def _buckets(self, group: Group, entries: Sequence[Entry], replicate: Ranks) -> list[Bucket]:
        layouts = [self._layout(entry, replicate) for entry in entries]
        devices = [entry.device for entry in entries]
        dtypes = [entry.tensor.dtype for entry in entries]
        together: Any = ()
        if moves_pairs(group):
            together = teams(group, entries)
            dtypes = [reduce(torch.promote_types, dtypes)] * len(entries)
        wires = [wire_dtype(group, *of) for of in zip(dtypes, devices, strict=True)]
        copies = 2 if together else 1  # the owner of a pair also gets the weights
        largest = max(wire.itemsize for wire in wires)
        limits = bucket_elements(group["bucket_mb"], copies * largest)
        buckets = plan_buckets(layouts, devices, limits[0], together, wires, limits[1])
        for bucket in buckets:
            bucket.back = returned_dtype(group, bucket.wire, bucket.device)
        return buckets

    def _layout(self, entry: Entry, replicate: Ranks) -> Layout:
        """Find the matrices of a tensor; done once for each kind of tensor."""
        tensor, divides = entry.tensor, False
        key: Any = entry.flat
        if entry.flat is None:
            placing = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None
            divides = (placing is not None or replicate.size > 1) and _divides(entry)
            shape, matrices = tuple(tensor.shape), entry.group["matrices"][entry.indices[0]]
            key = (shape, placing, matrices, divides, replicate, id(replicate.group))
        if key not in self._layouts:
            found = entry.layout(replicate)
            self._layouts[key] = found if divides else dataclasses.replace(found, replicate=ALONE)
        return self._layouts[key]


def momenta_of(entry: Entry, state: State) -> Sequence[Momentum]:
    """Return β of the next step for each matrix of an entry; with ``auto`` the one in use."""
    if "momentum_scores" in state:
        return momenta_in_use(state["momentum_scores"])
    if entry.group.get("momenta"):
        return entry.each(entry.group["momenta"])
    return [momentum_at(entry.group, int(state["step"]))] * len(entry.matrices)


def _replaced(plan: Plan, entries: Sequence[Entry]) -> bool:
    """Whether a plan for some entries replaces another plan."""
    same = plan.group["group_id"] == entries[0].group["group_id"]
    return same and (entries[0].flat is None or not {*plan.entries}.isdisjoint(entries))


def _check_whole(rule: Rule, entries: Sequence[Entry], buckets: Sequence[Bucket]) -> None:
    """Raise if a stage needs whole matrices and some rank holds only parts of them."""
    if all(stage.needs != "matrices" for stage in rule.stages):
        return
    for unit in (unit for bucket in buckets for unit in bucket.units):
        if any((p.rows, p.cols) != unit.shape for of_rank in unit.pieces for p in of_rank):
            raise ValueError(
                f"A matrix of {entries[unit.parameter].name} is not in one piece on each rank, and "
                "a stage of the update rule needs whole matrices. Train in one process or under "
                "DDP, without fused projections that are interleaved, or register the stage with "
                "needs='norms', 'entries' or a Statistic."
            )


def _step_sizes(
    group: Group, entries: Sequence[Entry], buckets: Sequence[Bucket]
) -> dict[Unit, float]:
    """Return the step-size factor of every matrix; in a pair that of the product."""
    rule = group["adjust_lr"]
    units = [unit for bucket in buckets for unit in bucket.units]
    matrices = {unit: entries[unit.parameter].matrices[unit.matrix] for unit in units}
    if not moves_pairs(group):
        return {unit: step_size(rule, matrices[unit]) for unit in units}
    sizes = {}
    for a, b in zip(units[::2], units[1::2], strict=True):
        scaling = entries[a.parameter].each(group["scalings"])[a.matrix]
        sizes[a] = sizes[b] = pair_step_size(rule, matrices[a], matrices[b], scaling)
    return sizes


def _there_and_back(bucket: Bucket) -> str:
    dtypes = dict.fromkeys([bucket.wire, bucket.back or bucket.wire])
    return ", back ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _divides(entry: Entry) -> bool:
    """Whether ranks that hold copies of a tensor divide the work on it."""
    group, matrices = entry.group, entry.matrices
    if group["distribute"] != "auto" or not matrices:
        return bool(group["distribute"] != "redundant")
    device = entry.device
    itemsize = wire_dtype(group, entry.tensor.dtype, device).itemsize
    together = [matrices[0]]
    if moves_pairs(group):  # A and B must get the same answer
        partner = partners(group)[entry.indices[0]]
        together.append(Matrix(*group["matrices"][partner][0]))
    return any(
        owning_pays(matrix.rows, matrix.cols, group["polar_steps"], itemsize, device.type)
        for matrix in together
    )
