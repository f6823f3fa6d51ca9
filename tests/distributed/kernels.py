"""Train flattened kernels under DDP's layout and FSDP2: kernels.py OUT.

Writes the whole weights that rank 0 ends with. Channels are uneven on purpose: a rank of two holds
parts of a group, and nothing of the smallest kernel.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_muon import create_muon_optimizer
from tests.distributed import layouts


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(3, 7, 3)
        self.grouped = nn.Conv2d(6, 9, 3, groups=3)
        self.transposed = nn.ConvTranspose1d(5, 4, 3)
        self.pointwise = nn.Conv2d(7, 5, 1)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.linear = nn.Linear(8, 8)


def train(kind):
    model = Model()
    told = {"replicate_group": "world"} if kind == "ddp" else {}
    settings = {"adjust_lr": "spectral", "adamw_lr": 1e-3, "polar_dtype": "float32"}
    optimizer = create_muon_optimizer(model, lr=0.02, conv="flatten", **told, **settings)
    if kind == "fsdp":  # swaps the parameters, as accelerate does for an optimizer
        names = [list(group["param_names"]) for group in optimizer.param_groups]
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        sharded = dict(model.named_parameters())
        for group, of_group in zip(optimizer.param_groups, names, strict=True):
            group["params"] = [sharded[name] for name in of_group]
    for step in range(3):
        layouts.set_gradients(model, step)
        optimizer.step()
    return model


def main():
    results = {}
    for kind in ("ddp", "fsdp"):
        model = train(kind)
        results[kind] = layouts.full_weights(model)
        results[kind, "sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])


if __name__ == "__main__":
    with layouts.process_group():
        main()
