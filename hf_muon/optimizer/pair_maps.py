"""The maps of LoRA pairs, computed by the rank that owns both A and B.

In: a bucket in which each A is followed by its B, with whole weights and filtered gradients. Out:
the whole changes; and, if ‖A‖ and ‖B‖ are balanced after the step, the number for each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_muon.distributed.buckets import Bucket, Unit
from hf_muon.distributed.exchange import combined
from hf_muon.optimizer.lora import Pair, PolarFunction, product_update
from hf_muon.optimizer.lora_tangent import balance_factor, tangent_update
from hf_muon.polar import batched_alike, devices
from hf_muon.rules import PAIR_MAPS
from hf_muon.stages import WholeMap

Settings = Mapping[str, Any]
UnitPair = tuple[Unit, Unit]
Whole = dict[Unit, Tensor]
Update = Callable[[Pair, Pair, float], Pair]
"""The change of some factors from weights, filtered gradients and the step-size factor."""


def map_pairs(
    bucket: Bucket,
    weights: Whole,
    gradients: Whole,
    sizes: Mapping[Unit, float],
    update: Update,
    due: Sequence[Unit],
) -> tuple[Whole, Whole]:
    """Return the changes of this rank's A and B, and the numbers that balance those due for it.

    On an accelerator, pairs of one shape and step size go in one batch. One by one, as on a CPU,
    they would cost up to 0.7 ms a pair; from rank 16 and 2048 columns on it makes no difference.
    """
    pairs = _in_pairs(bucket.mine)
    alike = batched_alike([(sizes[a], a.shape, b.shape) for a, b in pairs], bucket.device)
    changes: Whole = {}
    balance: Whole = {}
    for batch in alike:
        together = [pairs[number] for number in batch]
        old = _stacked(together, weights)
        change = update(old, _stacked(together, gradients), sizes[together[0][0]])
        changes.update(_each(together, change))
        balance.update(_each(together, _balance(old, change)) if due else ())
    return changes, balance


def _in_pairs(units: Sequence[Unit]) -> list[UnitPair]:
    return list(zip(units[::2], units[1::2], strict=True))


def _stacked(pairs: Sequence[UnitPair], whole: Whole) -> Pair:
    """Return copies, (k, r, n) and (k, m, r), aligned and contiguous whatever their source."""
    return Pair(*(torch.stack([whole[u] for u in units]) for units in zip(*pairs, strict=True)))


def _each(pairs: Sequence[UnitPair], values: Pair) -> Iterable[tuple[Unit, Tensor]]:
    """Yield every matrix of some pairs with its value."""
    for units, of_units in zip(zip(*pairs, strict=True), values, strict=True):
        yield from zip(units, of_units, strict=True)


def due_for_balance(bucket: Bucket, counts: Sequence[Tensor], every: int) -> list[Unit]:
    """Return the A and B to balance after a step; ``counts``: earlier steps, by parameter."""
    return [
        unit
        for pair in _in_pairs(bucket.units)
        if every and (int(counts[pair[0].parameter]) + 1) % every == 0
        for unit in pair
    ]


def _balance(old: Pair, change: Pair) -> Pair:
    """Return the numbers that balance A and B, from the whole A and B after the step, (k,) each."""
    dtype = devices.widest(old.a.device)
    squares = [(w + d).to(dtype).square().sum((-2, -1)) for w, d in zip(old, change, strict=True)]
    factor = balance_factor(*squares)
    return Pair(factor, 1 / factor)


def agreed_balance(
    bucket: Bucket, due: Sequence[Unit], balance: Whole
) -> Generator[None, None, Whole]:
    """Share the balancing numbers that the owners of the pairs have found.

    Each rank adds zeros to the owner's number. Summing squares over pieces would need a message as
    well, and would depend on the sharding: near the middle between two powers of two, so would the
    balance.
    """
    found = torch.zeros(len(due), device=bucket.device)
    for number, unit in enumerate(due):
        if unit in balance:
            found[number] = balance[unit]
    for ranks in (bucket.shard, bucket.replicate):
        yield from combined(found, ranks)
    return dict(zip(due, found, strict=True))


def _product(
    weights: Pair, gradients: Pair, size: float, polar: PolarFunction, settings: Settings
) -> Pair:
    return product_update(weights, gradients, polar=polar, **_shared(size, settings))


def _tangent(
    weights: Pair, gradients: Pair, size: float, polar: PolarFunction, settings: Settings
) -> Pair:
    shared = _shared(size, settings)
    iterations = settings["tangent_iterations"]
    return tangent_update(weights, gradients, polar=polar, iterations=iterations, **shared)


def _shared(size: float, settings: Settings) -> dict[str, Any]:
    lr, weight_decay = settings["lr"], settings["weight_decay"]
    decay = lr * weight_decay if weight_decay else 0.0  # a plain zero even if lr is a tensor
    return {"step": lr * size, "decay": decay, "damping": settings["lora_damping"]}


PAIR_MAPS["product"] = WholeMap(_product, of_pairs=True, may_fail=False)
PAIR_MAPS["tangent"] = WholeMap(_tangent, of_pairs=True, may_fail=False, balances=True)
