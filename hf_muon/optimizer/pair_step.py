"""One step on a bucket of LoRA pairs whose product moves, in the order of ``step``.

In: a group's settings, what this rank holds of its factors, and a bucket in which each A is
followed by its B. Out: weights and momentum buffers, changed in place. What needs both whole
factors is done on their owner, which gets the weights too and sends back the change::

    gradient ── filter ──► gather ──┐
                           weight ──┴─► update of the pair ── scatter ──► add
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Unit
from hf_muon.distributed.exchange import gather, reading, scatter, summed
from hf_muon.optimizer.lora import Pair, pair_step_size, product_update
from hf_muon.optimizer.lora_tangent import balance_factor, rescale, tangent_update
from hf_muon.optimizer.step import (
    Member,
    accumulate_all,
    blocks_of,
    filtered_gradients,
    polar_function,
    wire_dtype,
)
from hf_muon.polar import Workspace

Group = dict[str, Any]
UnitPair = tuple[Unit, Unit]


def pair_step(
    group: Group, members: list[Member], bucket: Bucket, workspace: Workspace
) -> Generator[None, None, None]:
    """Filter, update each pair on its owner, apply, balance; yields while others communicate.

    Args:
        group: Settings of the param group.
        members: The parameters that the plan was made for.
        bucket: Some of their matrices, A and B in turn.
        workspace: Memory for temporaries.
    """
    blocks = blocks_of(members, bucket.held)
    due = _due(group, members, bucket)
    accumulate_all((block, block.gradient) for block in blocks.values())
    dtypes = [members[unit.parameter].weight.dtype for unit in bucket.units]
    wire = wire_dtype(group, reduce(torch.promote_types, dtypes), bucket.device)
    weights = yield from gather(bucket, reading(lambda *item: blocks[item].weight), wire)
    gradients = yield from gather(bucket, filtered_gradients(blocks, group["nesterov"]), wire)
    changes: dict[Unit, Tensor] = {}
    balance: dict[Unit, Tensor] = {}
    for pairs, step in _batches(group, members, bucket):
        old, seen = _stacked(pairs, weights), _stacked(pairs, gradients)
        change = _update(group, old, seen, step, workspace)
        changes.update(_each(pairs, change))
        balance.update(_each(pairs, _balance(old, change)) if due else ())
    weights.clear()
    gradients.clear()
    results = yield from scatter(bucket, changes, wire)
    for item, moved in results.items():
        blocks[item].weight.add_(moved.to(blocks[item].weight.device))  # which may be offloaded
    factors = yield from _agreed(due, balance, bucket)
    for (unit, _), block in blocks.items():
        if unit in factors:
            rescale(block.weight, block.exp_avg, factors[unit])


def _update(
    group: Group, weights: Pair, gradients: Pair, step: float, workspace: Workspace
) -> Pair:
    """The change of some factors, with the settings of a group."""
    settings = {
        "step": step,
        "decay": group["lr"] * group["weight_decay"],
        "damping": group["lora_damping"],
        "polar": polar_function(group, workspace),
    }
    if group["lora_update"] == "product":
        return product_update(weights, gradients, **settings)
    return tangent_update(weights, gradients, **settings, iterations=group["tangent_iterations"])


def _in_pairs(units: list[Unit]) -> list[UnitPair]:
    return list(zip(units[::2], units[1::2], strict=True))


def _batches(
    group: Group, members: list[Member], bucket: Bucket
) -> Iterator[tuple[list[UnitPair], float]]:
    """This rank's pairs with their step: those of one shape and step together on an accelerator.

    On a CPU one by one, so that not even the last bits depend on which pairs a rank happens to own.
    That costs up to 0.7 ms a pair, and nothing from rank 16 and 2048 columns on.
    """
    batches: dict[Any, list[UnitPair]] = defaultdict(list)
    for index, (a, b) in enumerate(_in_pairs(bucket.mine)):
        member = members[a.parameter]
        of_a, of_b = member.matrices[a.matrix], members[b.parameter].matrices[b.matrix]
        size = pair_step_size(group["adjust_lr"], of_a, of_b, member.scalings[a.matrix])
        alone = index if bucket.device.type == "cpu" else -1
        batches[group["lr"] * size, a.shape, b.shape, alone].append((a, b))
    for (step, *_), pairs in batches.items():
        yield pairs, step


def _stacked(pairs: list[UnitPair], whole: dict[Unit, Tensor]) -> Pair:
    """Copies, (k, r, n) and (k, m, r): aligned and contiguous wherever they come from."""
    return Pair(*(torch.stack([whole[u] for u in units]) for units in zip(*pairs, strict=True)))


def _each(pairs: list[UnitPair], values: Pair) -> Iterable[tuple[Unit, Tensor]]:
    """Every unit of some pairs with its value."""
    for units, of_units in zip(zip(*pairs, strict=True), values, strict=True):
        yield from zip(units, of_units, strict=True)


def _due(group: Group, members: list[Member], bucket: Bucket) -> list[Unit]:
    """The factors that are balanced after this step, by the step count of A."""
    every = group["tangent_balance_every"] if group["lora_update"] == "tangent" else 0
    return [
        unit
        for pair in _in_pairs(bucket.units)
        if every and (int(members[pair[0].parameter].step) + 1) % every == 0
        for unit in pair
    ]


def _balance(old: Pair, change: Pair) -> Pair:
    """What each factor is multiplied by, from the whole factors after the step, (k,) each."""
    squares = [(w + d).double().square().sum((-2, -1)) for w, d in zip(old, change, strict=True)]
    factor = balance_factor(*squares)
    return Pair(factor, 1 / factor)


def _agreed(
    due: list[Unit], balance: dict[Unit, Tensor], bucket: Bucket
) -> Generator[None, None, dict[Unit, Tensor]]:
    """What the owners of some factors found.

    Each rank adds zeros to what the owner says. Sums of squares over pieces would need a message
    as well, and depend on the sharding: near the middle between two powers of two so would the
    balance.
    """
    if not due:
        return {}
    found = torch.zeros(len(due), device=bucket.device)
    for number, unit in enumerate(due):
        if unit in balance:
            found[number] = balance[unit]
    for ranks in (bucket.shard, bucket.replicate):
        yield from summed(found, ranks)
    return dict(zip(due, found, strict=True))
