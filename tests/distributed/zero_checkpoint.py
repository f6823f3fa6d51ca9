"""Train, save and go on under DeepSpeed, with given gradients: zero_checkpoint.py TASK FOLDER OUT.

``some`` and ``all`` train some or all of the cases, save halfway, convert the checkpoints to
universal ones, and go on: uninterrupted, from either checkpoint, from the weights alone, and with
other routes. ``load`` goes on from the universal ones, on any number of ranks. Rank 0 writes what
was trained.
"""

import sys
import warnings
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hf_muon import Muon
from tests.distributed import layouts, zero

STEPS, TAG = 3, "halfway"
RULES = {
    **{order: {"order": order} for order in ("pre_polar", "post_polar", "polar_only")},
    "two terms": {"momentum": (0.5, 0.9)},
}
# What they keep has no place in universal checkpoints, which hold Adam's two averages.
UNKNOWN_TO_ADAM = {
    "rows": {"rescale": "rows"},
    "int8": {"momentum_dtype": "int8", "prefilter": "clip", "momentum": (0.5, 0.8, 0.9)},
}
BFLOAT16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
# What DeepSpeed is told; the last has an optimizer class of its own there.
KINDS = {
    **{stage: zero.config(stage) for stage in (1, 2, 3)},
    "bf16": {**zero.config(1), **BFLOAT16},
}
ALL = [(kind, rule) for kind in KINDS for rule in RULES | UNKNOWN_TO_ADAM]
SOME = [(1, "polar_only"), (2, "post_polar"), (3, "pre_polar"), (2, "rows"), (3, "int8")]
ROUTED_OTHERWISE = SOME[:3]
MATRICES = {"q": (37, 64), "down": (48, 130), "experts": (3, 24, 40)}
EMBEDDINGS = {"embedding": (33, 16)}
VECTORS = {"norm": (40,), "bias": (24,)}
SHAPES = {**MATRICES, **EMBEDDINGS, **VECTORS}
# Routes other than those of the checkpoints: one matrix fewer, or another one.
OTHER_ROUTES = {
    "fewer": {"matrices": ("q", "experts"), "rest": ("down", "embedding")},
    "exchanged": {"matrices": ("q", "embedding", "experts"), "rest": ("down",)},
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            start = 0.1 * torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(start))

    def forward(self):
        return sum(p.sum() for p in self.parameters())


def build_optimizer(model, rule, matrices=tuple(MATRICES), rest=tuple(EMBEDDINGS)):
    """Three groups with settings of their own, none of which may end up in another one."""
    named = dict(model.named_parameters())
    groups = [
        {
            "params": [(name, named[name]) for name in matrices],
            "matrices": tuple(layouts.whole(named[name].shape) for name in matrices),
        },
        {
            "params": [(name, named[name]) for name in rest],
            "algorithm": "adamw", "lr": 3e-3, "weight_decay": 0.05,
        },
        {
            "params": [(name, named[name]) for name in VECTORS],
            "algorithm": "adamw", "lr": 1e-3, "weight_decay": 0.0,
        },
    ]  # fmt: skip
    return Muon(
        groups, lr=0.02, weight_decay=0.1, polar_dtype="float32", **(RULES | UNKNOWN_TO_ADAM)[rule]
    )


def engine_of(kind, rule, first=0, universal=False, **routes):
    model = Model()
    optimizer = build_optimizer(model, rule, **routes)
    zero.inject(optimizer, SHAPES, first)
    config = {**KINDS[kind], "checkpoint": {"load_universal": universal}}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1 - step / 10),
        config=config,
    )
    return engine


def train(engine):
    for _ in range(STEPS):
        engine.backward(engine())
        engine.step()


def finished(engine):
    """What an engine that is no longer needed has trained."""
    weights = {
        name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()
    }
    engine.destroy()
    return weights


def go_on(folder, kind, rule, universal=False, **load):
    """Train the second half from a checkpoint."""
    engine = engine_of(kind, rule, STEPS, universal)
    engine.load_checkpoint(str(folder), tag=TAG, **load)
    train(engine)
    return finished(engine)


def refusal(folder, kind, rule, universal, routes):
    """The error of a checkpoint, with other routes if any are named, as every rank sees it."""
    engine = engine_of(kind, rule, STEPS, universal, **OTHER_ROUTES.get(routes, {}))
    message = "none"
    try:
        engine.load_checkpoint(str(folder), tag=TAG)
        train(engine)
    except (ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    engine.destroy()
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages


def convert(source, target):
    """What ``python -m deepspeed.checkpoint.ds_to_universal`` does, in this process."""
    if dist.get_rank() == 0:
        ds_to_universal.main(
            SimpleNamespace(
                input_folder=f"{source}/{TAG}",
                output_folder=f"{target}/{TAG}",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    dist.barrier()


def save(folder, kind, rule):
    own, universal = f"{folder}/{kind}/{rule}", f"{folder}/{kind}/{rule}/universal"
    engine = engine_of(kind, rule)
    train(engine)
    engine.save_checkpoint(own, tag=TAG)
    convert(own, universal)
    train(engine)
    return {
        "uninterrupted": finished(engine),
        "resumed": go_on(own, kind, rule),
        "weights only": go_on(own, kind, rule, load_optimizer_states=False),
        "universal": (
            refusal(universal, kind, rule, True, None)
            if rule in UNKNOWN_TO_ADAM
            else go_on(universal, kind, rule, universal=True)
        ),
        "refused": {
            (name, routes): refusal(path, kind, rule, name == "universal", routes)
            for name, path in {"own": own, "universal": universal}.items()
            for routes in OTHER_ROUTES
            if (kind, rule) in ROUTED_OTHERWISE
        },
    }


def load(folder, kind, rule):
    universal = f"{folder}/{kind}/{rule}/universal"
    return {"universal": go_on(universal, kind, rule, universal=True)}


def main(task, folder, out):
    results = {
        case: (load if task == "load" else save)(folder, *case)
        for case in (SOME if task == "some" else ALL)
        if task != "load" or case[1] in RULES
    }
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    deepspeed.init_distributed("gloo")
    with layouts.process_group():
        main(*sys.argv[1:])
