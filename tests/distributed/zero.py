"""Train the matrices of layouts.py under DeepSpeed ZeRO, with the same gradients: zero.py OUT.

DeepSpeed's own gradients are replaced by the given ones in the flat tensors that it hands to the
optimizer. Rank 0 writes for each stage and case the whole weights, and the polar factors that each
rank computed.
"""

import dataclasses
import sys
from collections import Counter

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

import hf_muon.distributed.exchange
import hf_muon.optimizer.entries
from hf_muon.optimizer import auto_momentum
from tests.distributed import layouts

STAGES = (1, 2, 3)
SHAPES = {**layouts.SHAPES, **layouts.VECTORS}


class Model(layouts.Model):
    def forward(self):
        return sum(p.sum() for p in self.parameters())


def config(stage, **zero):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def inject(optimizer, shapes=SHAPES, first=0):
    """Before each step of the optimizer, put the gradients of steps from ``first`` on into it."""
    steps = Counter(dict.fromkeys(shapes, first))

    def given(optimizer, *_):
        for group in optimizer._origins.entries(optimizer.param_groups):
            for entry in group:
                names = entry.group["param_names"]
                values = torch.zeros_like(entry.tensor)
                for span in entry.flat.held:
                    name = names[span.parameter]
                    index, shape = list(shapes).index(name), torch.Size(shapes[name])
                    whole = layouts.gradient(shape, steps[name], index).flatten()
                    stop = span.offset + span.stop - span.start
                    values[span.offset : stop] = whole[span.start : span.stop]
                steps.update(names[index] for index in entry.indices)
                entry.tensor.grad = values

    optimizer.register_step_pre_hook(given)


def count_matrices():
    """The number of matrices whose polar factors this rank computed."""
    counts = Counter()
    original = hf_muon.distributed.exchange.apply_together

    def counted(function, batch, shapes):
        counts["computed"] += len(shapes)
        return original(function, batch, shapes)

    hf_muon.distributed.exchange.apply_together = counted
    return counts


def build(stage, zero=None, **case):
    model = Model()
    optimizer = layouts.build_optimizer(model, **case)
    inject(optimizer)
    settings = config(stage, **(zero or {}))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    vars(auto_momentum).update(layouts.CHOOSES_SOON)
    return engine, optimizer


def train(stage, **case):
    engine, _ = build(stage, **case)
    for _ in range(layouts.STEPS):
        engine.backward(engine())
        engine.step()
    weights = whole_weights(engine)
    engine.destroy()
    return weights


def whole_weights(engine):
    return {
        name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()
    }


def refused(engine):
    """What a step raises on each rank."""
    engine.backward(engine())
    try:
        engine.step()
        said = None
    except (ValueError, FloatingPointError) as error:
        said = str(error)
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, said)
    return messages


def not_finite(stage):
    """A gradient that is NaN on the last rank: messages, and weights before and after."""
    engine, optimizer = build(stage)
    before = whole_weights(engine)

    def spoil(optimizer, *_):
        if dist.get_rank() == dist.get_world_size() - 1:
            for (entry,) in optimizer._origins.entries(optimizer.param_groups)[:1]:
                entry.tensor.grad[entry.flat.held[-1].offset] = float("nan")

    optimizer.register_step_pre_hook(spoil)
    return {"messages": refused(engine), "before": before, "after": whole_weights(engine)}


def shift_regions():
    """A map that is wrong by one element, as a negative control."""
    original = hf_muon.optimizer.entries.find_flat

    def shifted(flat, parameters):
        found = original(flat, parameters)
        spans = tuple(
            tuple(s._replace(start=max(s.start - 1, 0), stop=s.stop - (s.start > 0)) for s in part)
            for part in found.spans
        )
        return dataclasses.replace(found, spans=spans)

    hf_muon.optimizer.entries.find_flat = shifted


def main(out):
    results = {}
    counts = count_matrices()
    for stage in STAGES:
        for case, settings in layouts.CASES.items():
            counts.clear()
            weights = train(stage, **settings)
            computed = [None] * dist.get_world_size()
            dist.all_gather_object(computed, counts["computed"])
            results[stage, case] = {"weights": weights, "computed": computed}
    results["not finite"] = {stage: not_finite(stage) for stage in STAGES}
    engine, _ = build(2, zero={"round_robin_gradients": True})
    results["round robin"] = refused(engine)
    shift_regions()
    results[3, "wrong region"] = {"weights": train(3, **layouts.CASES[layouts.DEFAULT])}
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    with layouts.process_group():
        main(sys.argv[1])
