"""One step on a bucket of matrices: the algorithm, in the order of the paper.

In: a group's settings, what this rank holds of its parameters, and a bucket of the plan. Out: the
weights and momentum buffers, changed in place. The order only says whether the momentum filter
stands before or after the polar factor; only the polar factor needs whole matrices, everything else
works on the pieces that this rank holds::

    gradient ── before ──► exchange: gather ── polar ── scatter ── after ──► decay, scale, write
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Item, Unit
from hf_muon.distributed.exchange import exchange, summed
from hf_muon.distributed.layout import Matrix, Piece
from hf_muon.optimizer.apply import apply_update
from hf_muon.optimizer.momentum import accumulate, filtered
from hf_muon.optimizer.scaling import match_update_rms, step_size
from hf_muon.polar import compute_dtype, orthogonalize
from hf_muon.polar.precision import svd_dtype

Group = dict[str, Any]


@dataclass
class Member:
    """A parameter in a step, or a piece of it: the tensors that this rank holds.

    ``scalings`` are those of LoRA factors, one for each matrix; ``step`` counts the steps before.
    """

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    momentum: float
    matrices: list[Matrix]
    scalings: list[float]
    step: Tensor

    def at(self, piece: Piece) -> Member:
        """Views of a piece, each (rows, cols)."""
        return Member(
            piece.of_local(self.weight),
            piece.of_local(self.gradient),
            piece.of_local(self.exp_avg),
            self.momentum,
            self.matrices,
            self.scalings,
            self.step,
        )


def bucket_step(group: Group, members: list[Member], bucket: Bucket) -> Generator[None, None, None]:
    """Filter, orthogonalize and apply, in the order of the group; yields while others communicate.

    Args:
        group: Settings of the param group.
        members: The parameters that the plan was made for.
        bucket: Some of their matrices.
    """
    order, nesterov = group["order"], group["nesterov"]
    blocks = {(unit, piece): members[unit.parameter].at(piece) for unit, piece in bucket.held}
    offloaded = members[bucket.units[0].parameter].weight.device != bucket.device

    def before(unit: Unit, piece: Piece) -> Tensor:
        block = blocks[unit, piece]
        if order != "pre_polar":
            return block.gradient
        return filtered(block.gradient, block.exp_avg, block.momentum, nesterov)

    def after(item: Item, factor: Tensor) -> Tensor:
        block = blocks[item]
        if offloaded:
            factor = factor.to(block.weight.device)
        if order != "post_polar":
            return factor
        accumulate(factor, block.exp_avg, block.momentum)
        return filtered(factor, block.exp_avg, block.momentum, nesterov)

    if order == "pre_polar":
        # Also pieces whose factor another replica computes: their buffers stay copies.
        for block in blocks.values():
            accumulate(block.gradient, block.exp_avg, block.momentum)
    wire = wire_dtype(group, members[bucket.units[0].parameter].weight.dtype, bucket.device)
    factors = yield from exchange(bucket, before, polar_function(group), wire)
    updates = {item: after(item, factor) for item, factor in factors.items()}
    if group["match_update_rms"]:
        updates = yield from _with_matched_rms(bucket, updates)
    for (unit, piece), update in updates.items():
        block = blocks[unit, piece]
        apply_update(
            block.weight,
            update,
            lr=group["lr"],
            scale=step_size(group["adjust_lr"], block.matrices[unit.matrix]),
            weight_decay=group["weight_decay"],
            cautious=group["cautious_weight_decay"],
        )


def _with_matched_rms(
    bucket: Bucket, updates: dict[Item, Tensor]
) -> Generator[None, None, dict[Item, Tensor]]:
    """Updates with the RMS of a polar factor; the norm of the whole takes one all-reduce."""
    place = {unit: index for index, unit in enumerate(bucket.units)}
    sums = torch.zeros(len(place), dtype=torch.float64, device=bucket.device)
    for (unit, _), update in updates.items():
        sums[place[unit]] += update.double().square().sum()
    yield from summed(sums, bucket.shard)
    factors = match_update_rms(sums, [unit.shape for unit in bucket.units])
    return {
        (unit, piece): update * factors[place[unit]].to(update)
        for (unit, piece), update in updates.items()
    }


def polar_function(group: Group) -> Callable[[Tensor], Tensor]:
    """The polar factor with the settings of a group, in its compute dtype."""
    return partial(
        orthogonalize,
        method=group["polar_method"],
        coefficients=group["coefficients"],
        steps=group["polar_steps"],
        dtype=group["polar_dtype"],
        compile=group["compile"],
    )


def wire_dtype(group: Group, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that polar factors are computed in; float16 has too small a range to travel in.

    Pairs of LoRA factors travel with their weights, in full precision.

    Args:
        group: Settings of the param group.
        dtype: Of the parameters.
        device: Where their polar factors are computed.
    """
    if group["lora_update"] != "factor":
        return torch.promote_types(dtype, torch.float32)
    requested = group["polar_dtype"]
    if group["polar_method"] == "svd":
        return svd_dtype(requested, dtype)
    computed = compute_dtype(requested, device)
    return torch.float32 if computed == torch.float16 else computed
