"""One step on a bucket of matrices: the algorithm, in the order of the paper.

In: a group's settings, what this rank holds of its parameters, and a bucket of the plan. Out: the
weights and momentum buffers, changed in place. The order only says whether the momentum filter
stands before or after the polar factor; only the polar factor needs whole matrices, everything else
works on the pieces that this rank holds::

    gradient ── filter ──► exchange: gather ── polar ── scatter ── filter ──► decay, scale, write
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Item, Unit
from hf_muon.distributed.exchange import Fill, exchange, newly_allocated, reading, summed
from hf_muon.distributed.layout import Matrix, Piece
from hf_muon.distributed.portions import portions
from hf_muon.optimizer.apply import apply_update
from hf_muon.optimizer.momentum import accumulate, filtered
from hf_muon.optimizer.scaling import match_update_rms, step_size
from hf_muon.polar import Workspace, compute_dtype, orthogonalize
from hf_muon.polar.precision import svd_dtype

Group = dict[str, Any]


@dataclass
class Member:
    """A parameter in a step: the tensors that this rank holds.

    ``scalings`` are those of LoRA factors, one for each matrix; ``step`` counts the steps before.
    """

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    momentum: float
    matrices: list[Matrix]
    scalings: list[float]
    step: Tensor


@dataclass
class Block:
    """A piece of a matrix in a step: views, (rows, cols), of what this rank holds."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    momentum: float
    matrix: Matrix


def blocks_of(members: Sequence[Member], items: Iterable[Item]) -> dict[Item, Block]:
    """The blocks of some pieces of the members' matrices."""
    return {item: _block(members[item[0].parameter], *item) for item in items}


def _block(member: Member, unit: Unit, piece: Piece) -> Block:
    return Block(
        piece.of_local(member.weight),
        piece.of_local(member.gradient),
        piece.of_local(member.exp_avg),
        member.momentum,
        member.matrices[unit.matrix],
    )


def bucket_step(
    group: Group, members: Sequence[Member], bucket: Bucket, workspace: Workspace
) -> Generator[None, None, None]:
    """Filter, orthogonalize and apply, in the order of the group; yields while others communicate.

    Args:
        group: Settings of the param group.
        members: The parameters that the plan was made for.
        bucket: Some of their matrices.
        workspace: Memory for temporaries.
    """
    blocks = blocks_of(members, bucket.held)
    polar = polar_function(group, workspace)
    wire = wire_dtype(group, members[bucket.units[0].parameter].weight.dtype, bucket.device)
    # Where others communicate, the matrices of several buckets are there at the same time.
    empty = workspace.empty if bucket.is_alone else newly_allocated

    inputs = reading(lambda *item: blocks[item].gradient)
    if group["order"] == "pre_polar":
        # Also pieces whose factor another replica computes: their buffers stay copies.
        accumulate_all((block, block.gradient) for block in blocks.values())
        inputs = filtered_gradients(blocks, group["nesterov"])
    factors = yield from exchange(bucket, inputs, lambda X: polar(X, out=X), wire, empty)
    factors = {item: factor.to(blocks[item].weight.device) for item, factor in factors.items()}
    if group["order"] == "post_polar":
        accumulate_all((blocks[item], factor) for item, factor in factors.items())

    found = None
    if group["match_update_rms"]:
        found = yield from _matching(bucket, _updates(group, bucket, blocks, factors))
    for number, scale, weights, updates in _updates(group, bucket, blocks, factors):
        if found is not None:
            updates = [update * found[number].to(update) for update in updates]
        apply_update(
            weights,
            updates,
            lr=group["lr"],
            scale=scale,
            weight_decay=group["weight_decay"],
            cautious=group["cautious_weight_decay"],
        )


def accumulate_all(inputs: Iterable[tuple[Block, Tensor]]) -> None:
    """Average an input into the buffer of each block."""
    rows = ((block.momentum, (x, block.exp_avg)) for block, x in inputs)
    for momentum, (x, exp_avg) in portions(rows):
        accumulate(x, exp_avg, momentum)


def filtered_gradients(blocks: Mapping[Item, Block], nesterov: bool) -> Fill:
    """Write what the filter makes of the gradients of some blocks, once they are accumulated."""

    def fill(items: Sequence[Item], places: Sequence[Tensor]) -> None:
        chosen = zip((blocks[item] for item in items), places, strict=True)
        rows = ((block.momentum, (block.gradient, block.exp_avg, at)) for block, at in chosen)
        for momentum, (gradients, exp_avg, into) in portions(rows):
            torch._foreach_copy_(into, filtered(gradients, exp_avg, momentum, nesterov))

    return fill


Updates = Iterator[tuple[int, float, list[Tensor], list[Tensor]]]


def _updates(
    group: Group, bucket: Bucket, blocks: Mapping[Item, Block], factors: Mapping[Item, Tensor]
) -> Updates:
    """Weights with their directions: of one unit, whose number comes first, if RMS is matched."""
    numbers = {unit: i for i, unit in enumerate(bucket.units)} if group["match_update_rms"] else {}
    rows = []
    for item, factor in factors.items():
        block = blocks[item]
        scale = step_size(group["adjust_lr"], block.matrix)
        key = (numbers.get(item[0], 0), scale, block.momentum)
        rows.append((key, (block.weight, block.exp_avg, factor)))
    for (number, scale, momentum), (weights, exp_avg, updates) in portions(rows):
        if group["order"] == "post_polar":
            updates = filtered(updates, exp_avg, momentum, group["nesterov"])
        yield number, scale, weights, updates


def _matching(bucket: Bucket, updates: Updates) -> Generator[None, None, Tensor]:
    """What brings each unit to the RMS of a polar factor; norms of the whole: one all-reduce."""
    sums = torch.zeros(len(bucket.units), dtype=torch.float64, device=bucket.device)
    for number, _, _, parts in updates:
        for part in parts:
            sums[number] += part.double().square().sum()
    yield from summed(sums, bucket.shard)
    return match_update_rms(sums, [unit.shape for unit in bucket.units])


def polar_function(group: Group, workspace: Workspace | None = None) -> Callable[..., Tensor]:
    """The polar factor with the settings of a group, in its compute dtype."""
    return partial(
        orthogonalize,
        method=group["polar_method"],
        coefficients=group["coefficients"],
        steps=group["polar_steps"],
        dtype=group["polar_dtype"],
        compile=group["compile"],
        workspace=workspace,
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
