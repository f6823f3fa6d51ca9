"""Count what each rank does in a step, under one sharding: counted.py KIND OUT.

Writes for each model and case a list with the counts of every rank: collectives and bytes, polar
factors and the operations of one iteration on them, and the largest number of bytes that the step
held besides what was there before.
"""

import sys
import weakref
from collections import Counter
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_muon.distributed import exchange
from hf_muon.distributed.owners import polar_cost
from hf_muon.polar import Workspace
from tests.distributed import layouts

# Large enough for a CPU to compute each alone, and no two of one shape: as in a batch of one.
LARGE = {f"m{i}": (136 + 8 * i, 128 + 16 * (i % 3)) for i in range(8)} | {"wide": (128, 400)}
MODELS = {"many kinds": layouts.SHAPES, "large": LARGE}
CASES = {
    "default": {},
    "owner": {"distribute": "owner"},
    "redundant": {"distribute": "redundant"},
    "small buckets": {"bucket_mb": 0.02},
    "bfloat16": {"polar_dtype": "bfloat16"},
    "post_polar": {"order": "post_polar"},
}


class Model(layouts.Model):
    """With a backward pass, which DeepSpeed wants to see."""

    def forward(self):
        return sum(p.square().sum() for p in self.parameters())


def count_polar_factors(counts):
    """Count the matrices that the exchange hands over to be orthogonalized."""
    original = exchange.apply_together

    def counted(function, batch, shapes):
        counts["matrices"] += len(shapes)
        counts["operations"] += sum(polar_cost(*shape) for shape in shapes)
        return original(function, batch, shapes)

    exchange.apply_together = counted


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the context took up at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in before:
                self._add(tensor.untyped_storage())
        return result

    def _key(self, tensor):
        return tensor.untyped_storage()._cdata

    def _add(self, storage):
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key):
        self.now -= self.alive.pop(key)


def watched(optimizer):
    """The memory that the optimizer uses; DeepSpeed calls it several times in a step."""
    memory, original = PeakMemory(), optimizer.step

    def step():
        with memory:
            original()

    optimizer.step = step
    return memory


def trained(kind, settings):
    """An optimizer, and a function that takes a step with it."""
    if kind.startswith("zero"):
        import deepspeed

        model = Model()
        optimizer = layouts.build_optimizer(model, **settings)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(kind[-1])},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return optimizer, lambda: (engine.backward(engine()), engine.step())

    model, told = layouts.build(kind)
    optimizer = layouts.build_optimizer(model, **told, **settings)
    layouts.set_gradients(model, 0)
    return optimizer, lambda: optimizer.step()


def main(kind, out):
    counts, results = Counter(), {}
    layouts.count_collectives(counts)
    count_polar_factors(counts)
    for model, case in product(MODELS, CASES):
        with mock.patch.object(layouts, "SHAPES", MODELS[model]):
            optimizer, step = trained(kind, CASES[case])
            step()  # makes the plan and the state
            counts.clear()
            optimizer._workspace = Workspace()  # or what it holds would not be counted
            memory = watched(optimizer)
            step()
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {**counts, "memory": memory.peak})
        results[model, case] = everyone
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    if sys.argv[1].startswith("zero"):
        from deepspeed import init_distributed

        init_distributed("gloo")
    with layouts.process_group():
        main(*sys.argv[1:])
