"""A rank's share of a bucket, and how its pieces go through the stages of a rule.

In: a bucket of the plan, with the tensors of its parameters. Out: views of them that are kept from
step to step, and the results of stages on pieces. Work on entries is done in portions. What a stage
must know of whole matrices is first summed over their pieces, in one message per bucket.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Unit
from hf_muon.distributed.exchange import combined, sections
from hf_muon.distributed.offload import staged
from hf_muon.distributed.portions import Portion, portions
from hf_muon.optimizer.context import Step
from hf_muon.optimizer.int8 import add_largest, decoded, encode
from hf_muon.optimizer.lora_tangent import rescale
from hf_muon.optimizer.parts import Part, Told, of_matrix
from hf_muon.polar import devices
from hf_muon.stages import (
    NORMS,
    Buffer,
    Given,
    Stage,
    Statistic,
    of_matrices,
)

Lists = Iterable[list[Tensor]]
Sums = dict[Unit, Tensor]


class Held:
    """This rank's share of a bucket: views of weights and buffers, kept from step to step.

    Attributes:
        bucket: A bucket of the plan.
        items: Its pieces on this rank; the lists are aligned with them.
        weights: (rows, cols) each.
        sizes: Step-size factors of all matrices of the bucket.
        scales: Step-size factors of the pieces.
    """

    def __init__(
        self,
        bucket: Bucket,
        weights: Sequence[Tensor],
        buffers: Mapping[Buffer, Sequence[Tensor]],
        sizes: Mapping[Unit, float],
    ) -> None:
        """Create the views into the tensors of all parameters, as this rank holds them."""
        self._tensors = weights, buffers
        self.bucket, self.items, self.sizes = bucket, bucket.held, sizes
        self.weights = self.views(weights)
        self._entries: dict[str, list[Tensor]] = {}
        self._of_units: dict[str, dict[Unit, Tensor]] = {}
        self._coded = {buffer for buffer in buffers if buffer.sizes in buffers}
        for buffer, tensors in buffers.items():
            if buffer.kind == "entries":
                self._entries[buffer.name] = self.views(tensors)
            else:
                found = {u: of_matrix(buffer, u, tensors[u.parameter]) for u in bucket.units}
                self._of_units[buffer.name] = found
        self.scales = [sizes[unit] for unit, _ in self.items]
        self.device = weights[bucket.units[0].parameter].device if bucket.units else bucket.device
        self._shapes = [unit.shape for unit, _ in self.items]
        place = {item: number for number, item in enumerate(self.items)}
        self._read = [place[item] for item in bucket.reads]
        self._parts: dict[str, tuple[list[Hashable], list[Part]]] = {}

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the pieces, (rows, cols), of tensors that belong to the parameters."""
        return [piece.of_local(tensors[unit.parameter]) for unit, piece in self.items]

    def moving(
        self, step: Step, gradients: Sequence[Tensor], of_pairs: bool
    ) -> Generator[None, None, Held]:
        """Return the same without the matrices, or pairs, whose gradient is zero on all ranks."""
        parts = self.parts("moving", [(0.0, 0.0)] * len(self.items), ())
        views = self.views(gradients)
        lists = [part.portion.of(views) for part in parts]
        sums = yield from self._sums(step, _MEASURED, NORMS, parts, lists)
        units = self.bucket.units
        # A rank may have a gradient while the ranks with copies have none.
        norms = torch.cat([sums[unit] for unit in units])
        yield from combined(norms, self.bucket.replicate, by=self.bucket.device)
        found = [norm > 0 for norm in norms.tolist()]
        if of_pairs:  # A and B are updated together
            found = [
                one for a, b in zip(found[::2], found[1::2], strict=True) for one in [a or b] * 2
            ]
        units = [unit for unit, moves in zip(units, found, strict=True) if moves]
        return Held(self.bucket.only(units), *self._tensors, self.sizes)

    def parts(self, name: str, keys: list[Hashable], stages: Sequence[Stage]) -> list[Part]:
        """Return portions whose pieces share a key (β, scale); uncut if a stage needs matrices.

        The latest portions under each name are cached.
        """
        if name not in self._parts or self._parts[name][0] != keys:
            shapes = [(piece.rows, piece.cols) for _, piece in self.items]
            cut = all(stage.needs != "matrices" for stage in stages)
            found = portions(keys, shapes, self.device, cut=cut)
            self._parts[name] = keys, [self._part(portion) for portion in found]
        return self._parts[name][1]

    def _part(self, portion: Portion) -> Part:
        kept = {name: portion.of(of_items) for name, of_items in self._entries.items()}
        for name, of_units in self._of_units.items():
            by_rows = all(one.dim() > 1 for one in of_units.values())
            kept[name] = self._of_pieces(portion, of_units, by_rows=by_rows)
        momentum, scale = portion.key
        weights, shapes = portion.of(self.weights), portion.each(self._shapes)
        return Part(portion, momentum, scale, weights, kept, shapes, {})

    def passed(
        self,
        step: Step,
        stages: Sequence[Stage],
        parts: Sequence[Part],
        tensors: Sequence[Tensor],
        measured: Sums | None = None,
    ) -> Generator[None, None, Lists]:
        """Pass some tensors through stages, portion by portion, when the result is read.

        ``measured`` is the first stage's statistic of whole matrices, if their owners have computed
        it already.
        """
        lists: Lists = (part.portion.of(tensors) for part in parts)
        for stage in stages:
            whole: Sums = {}
            if stage.statistic is not None:
                lists = list(lists)
                sums = measured
                if stage is not stages[0] or sums is None:
                    sums = yield from self._sums(step, stage, stage.statistic, parts, lists)
                whole = self._concluded(step, stage, stage.statistic, sums)
            if self._coded.isdisjoint(stage.buffers):
                lists = self._through(step, stage, parts, lists, whole)
            else:
                lists = yield from self._through_coded(step, stage, parts, lists, whole)
        return lists

    def _through(
        self, step: Step, stage: Stage, parts: Sequence[Part], lists: Lists, whole: Sums
    ) -> Iterator[list[Tensor]]:
        run = partial(_guarded, step, stage) if stage.may_fail else stage.run
        for part, x in zip(parts, lists, strict=True):
            kept, given = self._told(step, stage, part, whole)
            yield run(x, kept, given)

    def _told(self, step: Step, stage: Stage, part: Part, whole: Sums | None = None) -> Told:
        """Return what a stage gets with a portion; it rarely changes between steps, so is kept."""
        told = part.told.get(id(stage))
        if told is None or told[1].settings is not step.settings:
            steps: Sequence[int] = ()
            if stage.counts:
                steps = [step.numbers[unit.parameter] for unit, _ in part.portion.each(self.items)]
            fixed = (step.settings, part.momentum, part.shapes)
            given = Given(*fixed, steps=steps, weights=part.weights, scale=part.scale)
            told = self._read_buffers(stage, part), given
            if not stage.counts and self._coded.isdisjoint(stage.buffers):
                part.told[id(stage)] = told
        if whole:
            by_rows = stage.statistic is not None and stage.statistic.of_rows
            of_pieces = self._of_pieces(part.portion, whole, by_rows=by_rows)
            return told[0], told[1]._replace(whole=of_pieces)
        return told

    def _of_pieces(
        self, portion: Portion, of_units: Mapping[Unit, Tensor], *, by_rows: bool
    ) -> list[Tensor]:
        """Return for each piece of a portion the tensor of its matrix, or the rows that it has."""
        items = portion.each(self.items)
        if not by_rows:
            return [of_units[unit] for unit, _ in items]
        found = [of_units[unit][piece.row : piece.row + piece.rows] for unit, piece in items]
        return found if portion.rows is None else [one[portion.rows] for one in found]

    # --- whole matrices -------------------------------------------------------------------------

    def _sums(
        self,
        step: Step,
        stage: Stage,
        statistic: Statistic,
        parts: Sequence[Part],
        lists: Sequence[list[Tensor]],
    ) -> Generator[None, None, Sums]:
        """Return a statistic summed over the pieces of each matrix: one all-reduce."""
        flat, sums = self._empty(statistic, self.device)
        for part, x in zip(parts, lists, strict=True):
            items = part.portion.each(self.items)
            with step.guarded() as found:
                found += statistic.measure(x, *self._told(step, stage, part))
                _check_count(found, items)
            totals = self._of_pieces(part.portion, sums, by_rows=statistic.of_rows)
            if found:  # the measurement did not fail
                _add(totals, found, distinct=len({unit for unit, _ in items}) == len(items))
        yield from combined(flat, self.bucket.shard, by=self.bucket.device)
        return sums

    def measured(
        self, step: Step, statistic: Statistic, of_owner: Mapping[Unit, Tensor]
    ) -> Generator[None, None, Sums]:
        """Return the statistic from the whole matrices of this rank and of the other owners.

        The other ranks add zeros to the owner's result, so that its bits arrive unchanged.
        """
        flat, sums = self._empty(statistic, self.bucket.device)
        for unit, matrix in of_owner.items():
            given = Given(step.settings, 0.0, [unit.shape])
            with step.guarded() as found:
                found += statistic.measure([matrix], (), given)
                sums[unit].copy_(found[0])
        for ranks in (self.bucket.shard, self.bucket.replicate):
            yield from combined(flat, ranks)
        if self.device != flat.device:
            here, sums = self._empty(statistic, self.device)
            here.copy_(flat)
        return sums

    def _empty(self, statistic: Statistic, device: torch.device) -> tuple[Tensor, Sums]:
        """Return zeros for each matrix's statistic, and the memory of all of them."""
        units, width = self.bucket.units, statistic.width
        shapes = [(u.shape[0], width) if statistic.of_rows else (width,) for u in units]
        return self._zeros(shapes, devices.widest(self.bucket.device), device)

    def _zeros(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, dict[Unit, Tensor]]:
        flat = torch.zeros(sum(map(math.prod, shapes)), dtype=dtype, device=device)
        return flat, dict(zip(self.bucket.units, sections(flat, shapes), strict=True))

    def _concluded(self, step: Step, stage: Stage, statistic: Statistic, sums: Sums) -> Sums:
        """Conclude for each matrix; every rank that holds a piece of it gets the same result."""
        units = self.bucket.units
        if not units:  # no gradient reaches any of them
            return {}
        kept = of_matrices(
            stage,
            tuple(
                [self._of_units[b.name][u] for u in units] if b.kind != "entries" else []
                for b in stage.buffers
            ),
        )
        steps = [step.numbers[u.parameter] for u in units] if stage.counts else []
        given = Given(step.settings, 0.0, [u.shape for u in units], (), steps)
        of_units = [sums[unit] for unit in units]
        with step.guarded() as found:
            found += statistic.conclude(of_units, kept, given)
            _check_count(found, units)
        return dict(zip(units, found or of_units, strict=True))

    # --- momentum in int8 -----------------------------------------------------------------------

    def _read_buffers(self, stage: Stage, part: Part) -> tuple[list[Tensor], ...]:
        """Return a stage's buffers for a portion; int8 ones as the numbers they encode."""
        return tuple(
            [
                self._opened(part, buffer) if buffer in self._coded else part.kept[buffer.name]
                for buffer in stage.buffers
            ]
        )

    def _through_coded(
        self,
        step: Step,
        stage: Stage,
        parts: Sequence[Part],
        lists: Lists,
        whole: Sums,
    ) -> Generator[None, None, Lists]:
        """The same for buffers in int8: decode them, run the stage, encode them."""
        results, opened = [], []
        run = partial(_guarded, step, stage) if stage.may_fail else stage.run
        for part, x in zip(parts, lists, strict=True):
            kept, given = self._told(step, stage, part, whole)
            opened.append(kept)
            results.append(run(x, kept, given))
        for number, buffer in enumerate(stage.buffers):
            if buffer in self._coded:
                yield from self._closed(buffer, parts, [kept[number] for kept in opened])
        return results

    def _blocks(self, part: Part, of_units: Mapping[Unit, Tensor]) -> list[tuple[Tensor, int]]:
        """Return the block scales of each tensor of a portion, and its first column."""
        scales = self._of_pieces(part.portion, of_units, by_rows=True)
        return [
            (of_piece, piece.col)
            for of_piece, (_, piece) in zip(scales, part.portion.each(self.items), strict=True)
        ]

    def _opened(self, part: Part, buffer: Buffer) -> list[Tensor]:
        blocks = self._blocks(part, self._of_units[f"{buffer.name}_scale"])
        both = zip(part.kept[buffer.name], blocks, strict=True)
        return [decoded(q, largest, first) for q, (largest, first) in both]

    def _closed(
        self, buffer: Buffer, parts: Sequence[Part], lists: Sequence[list[Tensor]]
    ) -> Generator[None, None, None]:
        """Write a buffer; a block that is cut between ranks uses the largest entry of all parts."""
        kept = self._of_units[f"{buffer.name}_scale"]
        shapes = [tuple(kept[unit].shape) for unit in self.bucket.units]
        flat, sizes = self._zeros(shapes, torch.float32, self.device)
        for part, of_part in zip(parts, lists, strict=True):
            for x, (largest, first) in zip(of_part, self._blocks(part, sizes), strict=True):
                add_largest(x, largest, first)
        yield from combined(flat, self.bucket.shard, dist.ReduceOp.MAX, self.bucket.device)
        for unit, largest in sizes.items():
            kept[unit].copy_(largest)
        for part, of_part in zip(parts, lists, strict=True):
            blocks = self._blocks(part, kept)
            for x, q, (largest, first) in zip(of_part, part.kept[buffer.name], blocks, strict=True):
                encode(x, q, largest, first)

    def fill(self, parts: Sequence[Part], lists: Lists, places: Sequence[Tensor]) -> None:
        """Write the results for pieces that are needed; compute the rest only for its buffers."""
        with staged(places, self.device) as here:
            at = dict(zip(self._read, here, strict=True))
            for part, x in zip(parts, lists, strict=True):
                numbers, rows = part.portion.places, part.portion.rows
                wanted = [(at[n], one) for n, one in zip(numbers, x, strict=True) if n in at]
                if wanted:
                    into, found = zip(*wanted, strict=True)
                    torch._foreach_copy_(into if rows is None else [into[0][rows]], found)

    def rescale(self, factors: Mapping[Unit, Tensor]) -> None:
        """Multiply the weights of some matrices, and divide the buffers of their stages."""
        numbers = torch.stack(list(factors.values())).to(self.device)
        factors = dict(zip(factors, numbers, strict=True))
        scaled = [b for b in self._tensors[1] if b.scales and b not in self._coded]
        for number, (unit, _) in enumerate(self.items):
            if unit in factors:
                kept = [self._entries[b.name][number] for b in scaled if b.kind == "entries"]
                rescale(self.weights[number], kept, factors[unit])
        for of_units in (self._of_units[b.name] for b in scaled if b.kind != "entries"):
            for unit, factor in factors.items():
                of_units[unit].div_(factor.to(of_units[unit]))


def _add(totals: list[Tensor], found: list[Tensor], *, distinct: bool) -> None:
    """Add each result to its total, in one call if no two share a total."""
    found = [one.to(total) for total, one in zip(totals, found, strict=True)]
    if distinct:
        torch._foreach_add_(totals, found)
        return
    for total, one in zip(totals, found, strict=True):
        total += one


def _check_count(found: Sequence[Any], asked: Sequence[Any]) -> None:
    if len(found) != len(asked):
        raise ValueError(
            f"A Statistic gives {len(found)} results for {len(asked)} tensors: one for each is "
            "expected."
        )


def _guarded(
    step: Step, stage: Stage, x: list[Tensor], kept: tuple[list[Tensor], ...], given: Given
) -> list[Tensor]:
    """Run a stage on a portion; if it raises, return zeros, and the step raises later."""
    with step.guarded() as found:
        found += stage.run(x, kept, given)
    return found or [torch.zeros_like(one) for one in x]


def _no_run(*_: Any) -> list[Tensor]:
    raise NotImplementedError


_MEASURED = Stage(_no_run, needs=NORMS)
"""For norms that no stage asks for."""
