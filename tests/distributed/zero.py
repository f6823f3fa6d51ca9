"""Train the matrices of layouts.py under DeepSpeed ZeRO, with the same gradients: zero.py OUT.

DeepSpeed's own gradients are replaced by the given ones in the flat tensors that it hands to the
optimizer. Rank 0 writes for each stage and case the whole weights, and the polar factors computed
by each rank.
"""

import sys
from collections import Counter

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from tests.distributed import layouts

STAGES = (1, 2, 3)


class Model(layouts.Model):
    def forward(self):
        return sum(p.sum() for p in self.parameters())


def settings(stage, **zero):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def inject(optimizer, indices, counts):
    """Before each step of the optimizer, put the given gradients into its flat tensors."""
    steps = Counter()

    def given(optimizer, *_):
        for group in optimizer._origins.entries(optimizer.param_groups):
            for entry in group:
                values = torch.zeros_like(entry.tensor)
                for span in entry.flat.held:
                    name = entry.group["param_names"][span.parameter]
                    shape = torch.Size({**layouts.SHAPES, **layouts.VECTORS}[name])
                    whole = layouts.gradient(shape, steps[name], indices[name]).flatten()
                    stop = span.offset + span.stop - span.start
                    values[span.offset : stop] = whole[span.start : span.stop]
                for index in entry.indices:
                    steps[entry.group["param_names"][index]] += 1
                entry.tensor.grad = values

    optimizer.register_step_pre_hook(given)


def train(stage, **case):
    model = Model()
    indices = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    optimizer = layouts.build_optimizer(model, **case)
    inject(optimizer, indices, None)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
    for _ in range(layouts.STEPS):
        engine.backward(engine())
        engine.step()
    return engine


def main(out):
    results = {}
    for stage in STAGES:
        for case, chosen in layouts.CASES.items():
            engine = train(stage, **chosen)
            results[stage, case] = {
                name: safe_get_full_fp32_param(p).clone()
                for name, p in engine.module.named_parameters()
            }
            engine.destroy()
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    torch.set_num_threads(1)
    main(sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
