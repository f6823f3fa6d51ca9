"""One step on a bucket of matrices: the walk through a rule, in the order of the paper.

In: what this rank holds of a bucket, and what the step has of its group. Out: the weights and the
buffers of the rule's stages, changed in place. Only the map in the middle needs whole matrices,
everything else works on the pieces that this rank holds::

    gradient ── before ──► gather ── whole ── scatter ── after ──► decay, scale, write
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Unit
from hf_muon.distributed.exchange import (
    Fill,
    Result,
    exchange,
    gather,
    newly_allocated,
    reading,
    scatter,
    summed,
)
from hf_muon.distributed.portions import Portion, portions
from hf_muon.optimizer.apply import apply_update
from hf_muon.optimizer.lora_tangent import rescale
from hf_muon.optimizer.pair_maps import agreed_balance, due_for_balance, map_pairs
from hf_muon.polar import Workspace, compute_dtype, orthogonalize
from hf_muon.polar.precision import svd_dtype
from hf_muon.rules import MAPS, Buffer, Given, Rule, Stage, WholeMap

Settings = Mapping[str, Any]
Lists = Iterable[list[Tensor]]
Mapped = tuple[Result, list[Unit], dict[Unit, Tensor]]


@dataclass
class Step:
    """What a step has of a param group.

    ``gradients`` are this rank's parts, ``momenta`` and ``counts`` the β and the steps before, of
    each parameter. What a map that may fail raised is in ``failures``.
    """

    settings: Settings
    rule: Rule
    gradients: list[Tensor]
    momenta: list[float]
    counts: list[Tensor]
    workspace: Workspace
    failures: list[Exception] = field(default_factory=list)

    @contextmanager
    def guarded(self) -> Iterator[list[Tensor]]:
        """Keep an error of what may fail, and go on with a list that may stay empty.

        It may be of one rank alone, and others wait for its part of the step.
        """
        found: list[Tensor] = []
        try:
            yield found
        except Exception as error:  # whatever a decomposition or a stranger's function raises
            found.clear()
            self.failures.append(error)


class Part(NamedTuple):
    """A portion of the pieces that share β and scale, with what stays the same in every step."""

    portion: Portion
    momentum: float
    scale: float
    weights: list[Tensor]
    kept: dict[str, list[Tensor]]
    shapes: list[tuple[int, int]]


class Held:
    """What this rank holds of a bucket: views of weights and buffers, kept from step to step.

    Attributes:
        bucket: Of the plan.
        items: Its pieces on this rank; lists are aligned with them.
        weights: (rows, cols) each.
        buffers: The same for each buffer of the rule, by name.
        sizes: Step-size factors of all units of the bucket.
        scales: Those of the pieces.
    """

    def __init__(
        self,
        bucket: Bucket,
        weights: Sequence[Tensor],
        buffers: Mapping[Buffer, Sequence[Tensor]],
        sizes: Mapping[Unit, float],
    ) -> None:
        """Find the views in the tensors of all parameters, as this rank holds them."""
        self._tensors = weights, buffers
        self.bucket, self.items, self.sizes = bucket, bucket.held, sizes
        self.weights = self.views(weights)
        self.buffers = {
            buffer.name: self.views(of_all) if buffer.kind == "entries" else self._rows(of_all)
            for buffer, of_all in buffers.items()
        }
        self.scales = [sizes[unit] for unit, _ in self.items]
        self.device = self.weights[0].device if self.weights else bucket.device
        self._shapes = [unit.shape for unit, _ in self.items]
        place = {item: number for number, item in enumerate(self.items)}
        self._read = [place[item] for item in bucket.reads]
        self._parts: dict[str, tuple[list[Hashable], list[Part]]] = {}

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The pieces, (rows, cols), of what belongs to the parameters."""
        return [piece.of_local(tensors[unit.parameter]) for unit, piece in self.items]

    def _rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A number for each row of each matrix, (m, 1)."""
        return [tensors[u.parameter][u.matrix, : u.shape[0], None] for u, _ in self.items]

    def moving(self, gradients: Sequence[Tensor], of_pairs: bool) -> Generator[None, None, Held]:
        """The same without what has gradients of exactly zero on all ranks: matrices, or pairs."""
        parts = self.parts("moving", [(0.0, 0.0)] * len(self.items), ())
        views = self.views(gradients)
        norms = yield from self._norms(parts, (part.portion.of(views) for part in parts))
        units, found = self.bucket.units, [norm > 0 for norm in norms.tolist()]
        if of_pairs:  # a factor moves with its partner
            found = [
                one for a, b in zip(found[::2], found[1::2], strict=True) for one in [a or b] * 2
            ]
        units = [unit for unit, moves in zip(units, found, strict=True) if moves]
        return Held(self.bucket.only(units), *self._tensors, self.sizes)

    def parts(self, name: str, keys: list[Hashable], stages: Sequence[Stage]) -> list[Part]:
        """Portions with one key (β, scale), as some stages may have them.

        Those of the last keys are kept, under a name.
        """
        if name not in self._parts or self._parts[name][0] != keys:
            shapes = [(piece.rows, piece.cols) for _, piece in self.items]
            cut = all(stage.needs != "matrices" for stage in stages)
            found = portions(keys, shapes, self.device, cut=cut)
            self._parts[name] = keys, [self._part(portion) for portion in found]
        return self._parts[name][1]

    def _part(self, portion: Portion) -> Part:
        kept = {name: portion.of(buffer) for name, buffer in self.buffers.items()}
        momentum, scale = portion.key
        weights, shapes = portion.of(self.weights), portion.each(self._shapes)
        return Part(portion, momentum, scale, weights, kept, shapes)

    def passed(
        self, step: Step, stages: Sequence[Stage], parts: Sequence[Part], tensors: Sequence[Tensor]
    ) -> Generator[None, None, Lists]:
        """What stages make of the parts of some tensors, computed when it is asked for."""
        lists: Lists = (part.portion.of(tensors) for part in parts)
        for stage in stages:
            norms: list[Tensor] = []
            if stage.needs == "norms":
                lists = list(lists)
                found = yield from self._norms(parts, lists)
                of_units = dict(zip(self.bucket.units, found, strict=True))
                norms = [of_units[unit] for unit, _ in self.items]
            lists = _through(step, stage, parts, lists, norms)
        return lists

    def _norms(self, parts: Sequence[Part], lists: Lists) -> Generator[None, None, Tensor]:
        """Frobenius norms, float64, of what belongs to each unit: one all-reduce."""
        number = {unit: place for place, unit in enumerate(self.bucket.units)}
        sums = torch.zeros(len(number), dtype=torch.float64, device=self.bucket.device)
        for part, x in zip(parts, lists, strict=True):
            for (unit, _), one in zip(part.portion.each(self.items), x, strict=True):
                sums[number[unit]] += one.double().square().sum()
        yield from summed(sums, self.bucket.shard)
        return sums.sqrt()

    def fill(self, parts: Sequence[Part], lists: Lists, places: Sequence[Tensor]) -> None:
        """Write what is read of the pieces to its places; the rest is computed for its buffers."""
        at = dict(zip(self._read, places, strict=True))
        for part, x in zip(parts, lists, strict=True):
            numbers, rows = part.portion.places, part.portion.rows
            wanted = [(at[n], one) for n, one in zip(numbers, x, strict=True) if n in at]
            if wanted:
                into, found = zip(*wanted, strict=True)
                torch._foreach_copy_(into if rows is None else [into[0][rows]], found)

    def rescale(self, factors: Mapping[Unit, Tensor]) -> None:
        """Multiply the weights of some matrices, and divide what their stages keep."""
        for number, (unit, _) in enumerate(self.items):
            if unit in factors:
                kept = [buffer[number] for buffer in self.buffers.values()]
                rescale(self.weights[number], kept, factors[unit])


def _through(
    step: Step, stage: Stage, parts: Sequence[Part], lists: Lists, norms: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    names = [buffer.name for buffer in stage.buffers]
    for part, x in zip(parts, lists, strict=True):
        of_part = part.portion.each(norms) if norms else ()
        given = Given(step.settings, part.momentum, part.shapes, of_part)
        kept = tuple([part.kept[name] for name in names])
        if not stage.may_fail:
            yield stage.run(x, kept, given)
            continue
        with step.guarded() as found:
            found += stage.run(x, kept, given)
        yield found or [torch.zeros_like(one) for one in x]


def bucket_step(held: Held, step: Step) -> Generator[None, None, None]:
    """Walk through the rule; yields while others communicate.

    Args:
        held: A bucket, and what this rank holds of it.
        step: What the step has of its group.
    """
    if step.settings["skip_zero_gradients"]:
        held = yield from held.moving(step.gradients, step.rule.whole.of_pairs)
    momenta = [step.momenta[unit.parameter] for unit, _ in held.items]
    before = held.parts("before", [(momentum, 0.0) for momentum in momenta], step.rule.before)
    after = held.parts("after", [*zip(momenta, held.scales, strict=True)], step.rule.after)

    gradients = held.views(step.gradients)
    inputs = yield from held.passed(step, step.rule.before, before, gradients)
    whole = _map_pairs if step.rule.whole.of_pairs else _map_matrices
    results, due, balance = yield from whole(held, step, partial(held.fill, before, inputs))
    pairs = zip(held.items, held.weights, strict=True)
    factors = [results[item].to(weight.device) for item, weight in pairs]  # may be offloaded
    updates = yield from held.passed(step, step.rule.after, after, factors)
    for part, update in zip(after, updates, strict=True):
        _write(part, update, step)
    if due:
        held.rescale((yield from agreed_balance(held.bucket, due, balance)))


def _map_matrices(held: Held, step: Step, fill: Fill) -> Generator[None, None, Mapped]:
    """Map each matrix on its owner."""
    # Where others communicate, the matrices of several buckets are there at the same time.
    bucket = held.bucket
    empty = step.workspace.empty if bucket.is_alone else newly_allocated
    together = step.rule.whole.replaces
    results = yield from exchange(bucket, fill, _replacing(step), bucket.wire, empty, together)
    return results, [], {}


def _map_pairs(held: Held, step: Step, fill: Fill) -> Generator[None, None, Mapped]:
    """Map each A and its B, with their weights, on their owner; and what balances them, if due."""
    bucket, settings, rule = held.bucket, step.settings, step.rule
    every = settings["tangent_balance_every"] if rule.whole.balances else 0
    due = due_for_balance(bucket, step.counts, every)
    read = dict(zip(held.items, held.weights, strict=True))
    weights = yield from gather(bucket, reading(bucket, lambda *item: read[item]), bucket.wire)
    gradients = yield from gather(bucket, fill, bucket.wire)
    polar = polar_function(settings, step.workspace)
    update = partial(rule.whole.run, polar=polar, settings=settings)
    changes: dict[Unit, Tensor] = {}
    balance: dict[Unit, Tensor] = {}
    with step.guarded():
        changes, balance = map_pairs(bucket, weights, gradients, held.sizes, update, due)
    changes = changes or {unit: torch.zeros_like(weights[unit]) for unit in bucket.mine}
    weights.clear()
    gradients.clear()
    return (yield from scatter(bucket, changes, bucket.wire)), due, balance


def _write(part: Part, updates: list[Tensor], step: Step) -> None:
    """Decay, scale, add; the change of a pair has everything in it."""
    settings, moved = step.settings, step.rule.whole.of_pairs
    apply_update(
        part.weights,
        updates,
        lr=1.0 if moved else settings["lr"],
        scale=-1.0 if moved else part.scale,
        weight_decay=0.0 if moved else settings["weight_decay"],
        cautious=settings["cautious_weight_decay"],
    )


def _polar(X: Tensor, polar: Callable[..., Tensor], settings: Settings) -> Tensor:
    return polar(X)


MAPS["polar"] = WholeMap(_polar, replaces=True, may_fail=False)


def may_fail(rule: Rule, settings: Settings) -> bool:
    """Whether a step may have to be taken back; a decomposition may not converge."""
    return rule.may_fail or settings["polar_method"] == "svd"


def _replacing(step: Step) -> Callable[[Tensor], None]:
    """A map as a function that replaces matrices by what it makes of them; an error gives zeros."""
    whole, settings = step.rule.whole, step.settings
    polar = polar_function(settings, step.workspace)

    def replace(X: Tensor) -> None:
        if whole.replaces and settings["polar_method"] != "svd":
            whole.run(X, partial(polar, out=X), settings)
            return
        with step.guarded() as found:
            found.append(whole.run(X, polar, settings))
            _check_mapped(found[0], X)
        X.copy_(found[0]) if found else X.zero_()

    return replace


def _check_mapped(found: Tensor, X: Tensor) -> None:
    if found.shape != X.shape or not torch.isfinite(found).all():
        raise ValueError(
            f"A map made of a matrix of shape {tuple(X.shape)} one of shape {tuple(found.shape)}, "
            "or one that holds NaN or infinity."
        )


def polar_function(settings: Settings, workspace: Workspace | None = None) -> Callable[..., Tensor]:
    """The polar factor with the settings of a group, in its compute dtype."""
    return partial(
        orthogonalize,
        method=settings["polar_method"],
        coefficients=settings["coefficients"],
        steps=settings["polar_steps"],
        dtype=settings["polar_dtype"],
        compile=settings["compile"],
        workspace=workspace,
    )


def wire_dtype(settings: Settings, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that polar factors are computed in; float16 has too small a range to travel in.

    Pairs of LoRA factors travel with their weights, in full precision.

    Args:
        settings: Of the param group.
        dtype: Of the parameters.
        device: Where their polar factors are computed.
    """
    if settings["lora_update"] != "factor":
        return torch.promote_types(dtype, torch.float32)
    requested = settings["polar_dtype"]
    if settings["polar_method"] == "svd":
        return svd_dtype(requested, dtype)
    computed = compute_dtype(requested, device)
    return torch.float32 if computed == torch.float16 else computed
