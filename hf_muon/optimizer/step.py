"""One step on a bucket of matrices, in the order of the paper.

In: this rank's share of a bucket, and the data of its group. Out: the weights and the buffers of
the rule's stages, changed in place. Only the map in the middle needs whole matrices; everything
else works on the pieces that this rank holds::

    gradient ── before ──► gather ── whole ── scatter ── after ──► decay, scale, write
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Unit
from hf_muon.distributed.exchange import (
    Fill,
    Result,
    exchange,
    gather,
    newly_allocated,
    scatter,
)
from hf_muon.distributed.offload import fetched
from hf_muon.optimizer.context import Settings, Step
from hf_muon.optimizer.held import Held, Sums
from hf_muon.optimizer.pair_maps import agreed_balance, due_for_balance, map_pairs
from hf_muon.polar import Workspace, compute_dtype, devices, orthogonalize, products_for
from hf_muon.polar.precision import svd_dtype
from hf_muon.rules import rule_of


def bucket_step(held: Held, step: Step) -> Generator[None, None, None]:
    """Follow the rule through one bucket; yields while ranks communicate."""
    rule = step.rule
    if step.settings["skip_zero_gradients"]:
        held = yield from held.moving(step, step.gradients, rule.whole.of_pairs)
    momenta = [step.momenta[unit.parameter][unit.matrix] for unit, _ in held.items]
    ends = (*rule.after, rule.write)
    before = held.parts("before", [(momentum, 1.0) for momentum in momenta], rule.before)
    after = held.parts("after", [*zip(momenta, held.scales, strict=True)], ends)

    gradients = held.views(step.gradients)
    inputs = yield from held.passed(step, rule.before, before, gradients)
    whole = _map_pairs if rule.whole.of_pairs else _map_matrices
    mapped = yield from whole(held, step, partial(held.fill, before, inputs))
    factors = fetched([mapped.results[item] for item in held.items], held.device)
    written = yield from held.passed(step, ends, after, factors, mapped.measured)
    for _ in written:
        pass
    if mapped.due:
        held.rescale((yield from agreed_balance(held.bucket, mapped.due, mapped.balance or {})))


class Mapped(NamedTuple):
    """The results of the maps on a bucket.

    Attributes:
        results: For each piece of this rank.
        measured: The next stage's statistic of the whole results, if their owners computed it.
        due: The A and B of LoRA pairs that are to be balanced.
        balance: The numbers that balance those of this rank.
    """

    results: Result
    measured: Sums | None = None
    due: Sequence[Unit] = ()
    balance: dict[Unit, Tensor] | None = None


def _map_matrices(held: Held, step: Step, fill: Fill) -> Generator[None, None, Mapped]:
    """Map each matrix on its owner, who also measures what the next stage needs."""
    # While ranks communicate, the matrices of several buckets exist at the same time.
    bucket, whole = held.bucket, step.rule.whole
    empty = step.workspace.empty if bucket.is_alone else newly_allocated
    seen: dict[Unit, Tensor] = {}
    results = yield from exchange(
        bucket, fill, _replacing(bucket, step), bucket.wire, empty, whole.replaces, seen
    )
    following = step.rule.after[0] if step.rule.after else step.rule.write
    statistic = following.statistic
    if statistic is None or not statistic.of_input:
        return Mapped(results)
    return Mapped(results, (yield from held.measured(step, statistic, seen)))


def _map_pairs(held: Held, step: Step, fill: Fill) -> Generator[None, None, Mapped]:
    """Map each LoRA pair, with its weights, on its owner; and find its balance, if due."""
    bucket, settings, rule = held.bucket, step.settings, step.rule
    every = settings["tangent_balance_every"] if rule.whole.balances else 0
    due = due_for_balance(bucket, step.counts, every)
    parts = held.parts("weights", [(0.0, 0.0)] * len(held.items), ())
    fill_weights = partial(held.fill, parts, [part.weights for part in parts])
    weights = yield from gather(bucket, fill_weights, bucket.wire)
    gradients = yield from gather(bucket, fill, bucket.wire)
    polar = polar_function(settings, step.workspace)
    update = partial(rule.whole.run, polar=polar, settings=settings)
    changes: dict[Unit, Tensor] = {}
    balance: dict[Unit, Tensor] | None = None
    with step.guarded():
        changes, balance = map_pairs(bucket, weights, gradients, held.sizes, update, due)
    changes = changes or {unit: torch.zeros_like(weights[unit]) for unit in bucket.mine}
    weights.clear()
    gradients.clear()
    results = yield from scatter(bucket, changes, bucket.wire)
    return Mapped(results, None, due, balance)


def _replacing(bucket: Bucket, step: Step) -> Callable[[Tensor], None]:
    """Return a function that replaces matrices by their map; after an error, by zeros."""
    whole, settings = step.rule.whole, step.settings
    usual = polar_function(settings, step.workspace)

    def replace(X: Tensor, polar: Callable[..., Tensor] = usual) -> None:
        if whole.replaces and settings["polar_method"] != "svd":
            whole.run(X, partial(polar, out=X), settings)
            return
        with step.guarded() as found:
            found.append(whole.run(X, polar, settings))
            if whole.may_fail:
                _check_mapped(found[0], X)
        X.copy_(found[0]) if found else X.zero_()

    if devices.is_cpu(bucket.device):
        return replace
    return step.outliers.watched(replace, usual, chain(*bucket.batches), bucket.back)


def _check_mapped(found: Tensor, X: Tensor) -> None:
    if found.shape != X.shape or not torch.isfinite(found).all():
        raise ValueError(
            f"A map made of a matrix of shape {tuple(X.shape)} one of shape {tuple(found.shape)}, "
            "or one that holds NaN or infinity."
        )


def polar_function(settings: Settings, workspace: Workspace | None = None) -> Callable[..., Tensor]:
    """Return the polar function with a group's settings; its results are in the compute dtype."""
    return partial(
        orthogonalize,
        method=settings["polar_method"],
        coefficients=settings["coefficients"],
        steps=settings["polar_steps"],
        dtype=settings["polar_dtype"],
        kernel=settings["polar_kernel"],
        compile=settings["compile"],
        workspace=workspace,
    )


def products_name(settings: Settings, device: torch.device, is_fake: bool) -> str:
    """Return the name of what multiplies on a device, after a check at first use.

    Raises:
        RuntimeError: ``polar_kernel`` names one that cannot be used.
    """
    svd = settings["polar_method"] == "svd" or rule_of(settings).whole.decomposes
    if svd or settings["compile"]:
        return "torch"
    dtype = compute_dtype(settings["polar_dtype"], device)
    kernel = settings["polar_kernel"]
    return products_for(kernel, device, dtype, by_halves=True, is_fake=is_fake).name


def wire_dtype(settings: Settings, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which inputs travel: the compute dtype, except float16 (range too small).

    LoRA pairs travel with their weights, in full precision. ``dtype`` is that of the parameters.
    """
    if settings["lora_update"] != "factor":
        return torch.promote_types(dtype, torch.float32)
    requested = settings["polar_dtype"]
    if settings["polar_method"] == "svd" or rule_of(settings).whole.decomposes:
        return svd_dtype(requested, dtype)
    computed = compute_dtype(requested, device)
    return torch.float32 if computed == torch.float16 else computed


def returned_dtype(settings: Settings, wire: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which results travel back from their owners; ``wire`` is that of inputs.

    float16 holds polar factors that were computed in it: their entries are at most 1.2. The results
    of other maps may be of any size.
    """
    whole = rule_of(settings).whole
    if not whole.replaces or settings["polar_method"] == "svd":
        return wire
    computed = compute_dtype(settings["polar_dtype"], device)
    return computed if computed == torch.float16 else wire
