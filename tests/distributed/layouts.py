"""Train the same matrices, with the same gradients, under one sharding: layouts.py KIND OUT.

Writes for each case the whole weights that rank 0 ends with, whether all ranks agree, and what was
counted. Shapes are uneven on purpose: (5, 40) leaves a rank of four without rows.
"""

import os
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_muon import Muon
from hf_muon.optimizer import auto_momentum, plans
from hf_muon.rules import register_map

SHAPES = {
    "q": (37, 64),
    "up": (130, 48),
    "down": (48, 130),
    "tiny": (5, 40),
    "square": (64, 64),
    "another": (64, 64),
    "experts": (6, 24, 40),
    "few_experts": (3, 24, 40),
    "fused": (50, 32),
    "columns": (20, 48),
    "interleaved": (24, 30),
    # Beside its transpose, as the factors of an adapter of rank one.
    "line": (1, 36),
    "column": (36, 1),
    # One row: a rank holds nothing of it.
    **{f"row{i}": (1, 200) for i in range(4)},
    **{f"small{i}": (4, 7 + i % 2) for i in range(6)},
}
VECTORS = {"embedding": (33, 16), "norm": (7,)}
# Rows 0-29 and 30-49; columns in thirds; heads of 4 rows, three projections interleaved.
MATRICES = {
    "fused": ((0, (30, 32), (32, 1), 0), (960, (20, 32), (32, 1), 0)),
    "columns": tuple((16 * i, (20, 16), (48, 1), 1) for i in range(3)),
    "interleaved": tuple((120 * i, (2, 4, 30), (360, 30, 1), 0) for i in range(3)),
}
STEPS = 5
CASES = {
    **{
        f"{order}, {dtype}, {'Nesterov' if nesterov else 'plain'}": {
            "order": order, "polar_dtype": dtype, "nesterov": nesterov,
        }
        for order in ("pre_polar", "post_polar", "polar_only")
        for dtype in ("float32", "bfloat16")
        for nesterov in (True, False)
    },
    "small buckets": {"bucket_mb": 0.02},
    "tiny buckets": {"bucket_mb": 1e-4, "distribute": "owner"},
    "owner": {"distribute": "owner"},
    "warmup": {"momentum_start": 0.5, "momentum_warmup_steps": 2},
    "svd": {"polar_method": "svd"},
    "cautious decay": {"cautious_weight_decay": True},
    "redundant": {"distribute": "redundant"},
    "matched rms": {"order": "post_polar", "match_update_rms": True},
    # Filters.
    "two terms": {"momentum": (0.9, 0.98), "momentum_weights": (0.44, 0.56)},
    "three terms behind": {
        "momentum": (0.5, 0.9, 0.98), "nesterov": False, "order": "post_polar",
    },
    "auto": {"momentum": "auto"},
    "clip": {"prefilter": "clip", "prefilter_threshold": 1.5},
    "clip, polar only": {"prefilter": "clip", "order": "polar_only"},
    "norm": {"prefilter": "norm"},
    "cooldown": {
        "momentum_end": 0.5, "momentum_cooldown_start": 1, "momentum_cooldown_steps": 3,
        "momentum_schedule": "cosine",
    },
    "momenta": {"momenta": True},
    # Maps, rescalings, writes.
    "polargrad": {"matrix_map": "polargrad"},
    "soft": {"matrix_map": "soft", "map_power": 0.5},
    "rows": {"rescale": "rows"},
    "rows behind": {"rescale": "rows", "order": "post_polar"},
    "entries": {"rescale": "entries"},
    "frobenius": {"rescale": "frobenius"},
    "hyperball": {"step_rule": "hyperball", "weight_decay": 0.0},
    "relative": {"step_rule": "relative"},
    # Bytes.
    "int8": {"momentum_dtype": "int8"},
    "int8, all at once": {
        "momentum_dtype": "int8", "momentum": (0.9, 0.98), "rescale": "entries",
        "prefilter": "clip", "step_rule": "relative",
    },
}  # fmt: skip
# A sum over a whole matrix enters, which pieces give in another order: float64, rounded once.
TO_ROUNDING = {
    "matched rms", "clip", "clip, polar only", "norm", "rows behind", "entries", "hyperball",
    "relative", "int8, all at once",
}  # fmt: skip
# So that the choice is made within a few steps.
CHOOSES_SOON = {"SCORED_OVER": 4, "LEAD": 0.0}
# Whose results travel back in float16: steps of 1/16 fit, and what does not is rounded.
IN_FLOAT16 = {
    "fits": {"matrix_map": "sixteenths", "distribute": "owner"},
    "rounded": {"distribute": "owner"},
}
DEFAULT, OTHER = "pre_polar, float32, Nesterov", "pre_polar, float32, plain"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {**SHAPES, **VECTORS}.items():
            start = 0.1 * torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(start))


class LinearModel(nn.Module):
    """For tensor parallelism, which shards layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(36, 72, bias=False)
        self.b = nn.Linear(72, 36, bias=False)
        self.c = nn.Linear(36, 36, bias=False)
        self.norm = nn.Parameter(torch.randn(7))


def build(kind):
    """The model under a sharding, and what the optimizer must be told."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    model = LinearModel() if kind.endswith("tp") else Model()
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "hsdp":
        names = ("replicate", "shard")
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names))
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    return model, {"replicate_group": "world"} if kind == "ddp" else {}


def build_optimizer(model, momenta=False, **settings):
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if p.ndim >= 2 and n not in VECTORS]
    rest = [(n, p) for n, p in named if p.ndim < 2 or n in VECTORS]
    regions = tuple(MATRICES.get(name, whole(p.shape)) for name, p in matrices)
    per_parameter = {"momenta": tuple(0.5 + 0.02 * i for i in range(len(matrices)))}
    groups = [
        {"params": matrices, "matrices": regions, **(per_parameter if momenta else {})},
        {"params": rest, "algorithm": "adamw", "lr": 1e-3},
    ]
    return Muon(groups, **{"lr": 0.02, "weight_decay": 0.1, "polar_dtype": "float32", **settings})


def whole(shape):
    m, n = shape[-2:]
    count = shape.numel() // (m * n)
    return tuple((i * m * n, (m, n), (n, 1), 0) for i in range(count))


def gradient(shape, step, index):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + index))


def set_gradients(model, step, skip=()):
    for index, (name, p) in enumerate(model.named_parameters()):
        g = gradient(p.shape, step, index)
        if isinstance(p, DTensor):
            g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = None if name in skip else g


def full_weights(model):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def count_collectives(counts):
    """Count launches and bytes sent, from inside the calls that the exchange makes."""
    for name in ("all_to_all_single", "all_gather_single"):
        original = getattr(dist, name)

        def counted(out, given, *args, original=original, name=name, **kwargs):
            counts[name] += 1
            counts[f"{name} bytes"] += given.nbytes
            return original(out, given, *args, **kwargs)

        setattr(dist, name, counted)


def sixteenths(X, polar, settings):
    """A map of X in units that float16 does not reach, to numbers that it holds."""
    return (X * 2**-20 * 16).round().clamp(-16, 16) / 16


register_map("sixteenths", sixteenths)


def train(kind, scale=1.0, **settings):
    model, told = build(kind)
    optimizer = build_optimizer(model, **told, **settings)
    with mock.patch.multiple(auto_momentum, **CHOOSES_SOON):
        for step in range(STEPS):
            set_gradients(model, step)
            for p in model.parameters():
                p.grad.mul_(scale)
            optimizer.step()
    return model, optimizer


@contextmanager
def returned(dtype):
    """Let results travel in a dtype, as they do from a GPU that computes in it."""
    with mock.patch.object(plans, "returned_dtype", lambda group, wire, _: dtype or wire):
        yield


@contextmanager
def process_group():
    """A group on gloo that no rank leaves before the others are done."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not dist.is_initialized():  # DeepSpeed does it its own way
        dist.init_process_group("gloo")
    yield
    leave_together()


def leave_together():
    """End this process, successfully, when all others are done too.

    Python's own end may abort: threads of gloo's let go of tensors late, also after the group is
    destroyed, and must not find the interpreter half gone.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main():
    kind, out = sys.argv[1:3]
    results = {}
    counts = Counter()
    count_collectives(counts)
    for case, settings in {**CASES, **IN_FLOAT16}.items():
        counts.clear()
        with returned(torch.float16 if case in IN_FLOAT16 else None):
            model, _ = train(kind, 2.0**20 if case in IN_FLOAT16 else 1.0, **settings)
        weights = full_weights(model)
        placed = all(isinstance(p, DTensor) for p in model.parameters())
        everyone = [None] * dist.get_world_size()
        sums = [float(w.double().sum()) for w in weights.values()]
        sent = [counts[f"{name}_single bytes"] for name in ("all_to_all", "all_gather")]
        dist.all_gather_object(everyone, (sums, sent))
        results[case] = {
            "weights": weights,
            "same on all ranks": all(sums == everyone[0][0] for sums, _ in everyone),
            "sent by all": tuple(map(sum, zip(*(sent for _, sent in everyone), strict=True))),
            "counts": dict(counts),
            "dtensor": placed,
        }
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    with process_group():
        main()
