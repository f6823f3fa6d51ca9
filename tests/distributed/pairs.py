"""Train LoRA pairs, with given gradients, under one sharding: pairs.py KIND OUT.

KIND is one of layouts.py, or ``zero``: stages 2 and 3. Rank 0 writes for each case the whole
weights it ends with, and whether all ranks agree. The pairs have ranks that leave members of a
shard group without rows, experts in strided columns, and rank 1.
"""

import sys
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_muon import Muon
from tests.distributed import layouts
from tests.reference import pairs

STEPS = 5
CASES = {
    "factor": {"lora_update": "factor"},
    "product": {"lora_update": "product"},
    "tangent": {"lora_update": "tangent", "tangent_balance_every": 2},
    "product, owner": {"lora_update": "product", "distribute": "owner"},
    "tangent, owner": {
        "lora_update": "tangent", "tangent_balance_every": 2, "distribute": "owner",
    },
    "small buckets": {"lora_update": "product", "distribute": "owner", "bucket_mb": 1e-3},
    "without balance": {"lora_update": "tangent", "tangent_balance_every": 0},
    "bfloat16": {"lora_update": "product", "polar_dtype": "bfloat16", "distribute": "owner"},
}  # fmt: skip
# Factors that get no gradient in one step, though their partner does. ZeRO knows no such thing.
WITHOUT_GRADIENT = ("up_A", "experts_B")
STAGES = (2, 3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        # Far out of balance, so that balancing has something to do.
        for name, parameter in pairs.parameters(uneven=30.0).items():
            self.register_parameter(name, parameter)
        self.register_parameter("norm", nn.Parameter(torch.ones(7)))

    def forward(self):
        return sum(p.sum() for p in self.parameters())


SHAPES = {name: tuple(p.shape) for name, p in Model().named_parameters()}


def build_optimizer(model, **settings):
    named = dict(model.named_parameters())
    rest = {"params": [("norm", named.pop("norm"))], "algorithm": "adamw", "lr": 1e-3}
    told = {"lr": 0.02, "weight_decay": 0.1, "polar_dtype": "float32", **settings}
    return Muon([pairs.group_of(named), rest], **told)


def train(kind, skip=WITHOUT_GRADIENT, **settings):
    """Whole weights after some steps; in the second one the gradients of ``skip`` are missing."""
    model, told = Model(), {"replicate_group": "world"} if kind == "ddp" else {}
    world = dist.get_world_size() if dist.is_initialized() else 1
    if kind in ("fsdp", "hsdp"):
        sizes = (2, world // 2) if kind == "hsdp" else (world,)
        names = ("replicate", "shard")[-len(sizes) :]
        fully_shard(model, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=names))
    optimizer = build_optimizer(model, **told, **settings)
    for step in range(STEPS):
        layouts.set_gradients(model, step, skip=skip if step == 1 else ())
        optimizer.step()
    return layouts.full_weights(model)


def train_with_zero(stage, zero_settings=None, **settings):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from tests.distributed import zero

    model = Model()
    optimizer = build_optimizer(model, **settings)
    zero.inject(optimizer, SHAPES)
    config = zero.config(stage, **(zero_settings or {}))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        for _ in range(STEPS):
            engine.backward(engine())
            engine.step()
        return {
            name: safe_get_full_fp32_param(p).clone()
            for name, p in engine.module.named_parameters()
        }
    finally:
        engine.destroy()


def split_pair():
    """What every rank says where a sub-group of ZeRO-3 ends between A and B."""
    message = "nothing"
    small = {"sub_group_size": 1, "stage3_param_persistence_threshold": 0}
    try:
        train_with_zero(3, small, lora_update="product")
    except ValueError as error:
        message = str(error)
    return gathered(message)


def gathered(value):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def main(kind, out):
    runs = {kind: partial(train, kind)}
    if kind == "zero":
        runs = {f"zero{stage}": partial(train_with_zero, stage) for stage in STAGES}
    results = {}
    for name, run in runs.items():
        for case, settings in CASES.items():
            weights = run(**settings)
            sums = gathered([float(w.double().sum()) for w in weights.values()])
            results[name, case] = {"weights": weights, "same": all(s == sums[0] for s in sums)}
    if kind == "zero":
        results["split"] = split_pair()
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    if sys.argv[1] == "zero":
        import deepspeed

        deepspeed.init_distributed("gloo")
    with layouts.process_group():
        main(*sys.argv[1:])
