"""Robust aggregation on real ranks: robust.py KIND FOLDER; each rank saves what it saw.

KIND is ddp, or a launch of train.py that has to be refused.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

import hf_muon.auto  # noqa: F401
import tests.distributed.fsdp_on_cpu  # noqa: F401
from hf_muon import Muon, RobustAggregation
from hf_muon.distributed.robust import METHODS as ROBUST
from hf_muon.distributed.robust import Robust, make_robust
from tests.distributed.layouts import leave_together
from tests.distributed.train import launcher, lora
from tests.integration.tiny import arguments, tiny_data, tiny_llama

ATTACK = -10.0
METHODS = {name: Robust(name) for name in ROBUST} | {"mean": None}


def is_last():
    return dist.get_rank() == dist.get_world_size() - 1


class Locals:
    """Turns around the gradients of the last rank, and sums up what every rank hands to DDP."""

    def __init__(self, model, factor=ATTACK):
        self.sums = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_hook(lambda g, n=name: self.add(n, g * factor if is_last() else g))

    def add(self, name, gradient):
        self.sums[name] = self.sums.get(name, 0) + gradient.detach().clone()
        return gradient


def mlp():
    """Odd sizes, and one part that is not trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 37), nn.ReLU(), nn.Linear(37, 29), nn.ReLU())
    model.append(nn.Linear(29, 3))
    model[2].bias.requires_grad_(False)
    return model


def batch(number):
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + number)
    return torch.randn(256, 13, generator=generator)


def gradients(method, factor, micro_batches=1, dtype=torch.float32):
    """The gradients of one step under DDP with many small buckets, and those of this rank."""
    model = mlp().to(dtype)
    local = Locals(model, factor)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.002)
    state = METHODS[method] and make_robust(wrapped, Robust(method))
    for number in range(micro_batches - 1):
        with wrapped.no_sync():
            wrapped(batch(number).to(dtype)).square().mean().backward()
    wrapped(batch(micro_batches).to(dtype)).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    bad = [] if state is None else state.not_finite.tolist()
    return {"local": local.sums, "found": found, "not_finite": bad}


class Watch(TrainerCallback):
    """Gradients of the first step, as the optimizer gets them, and those of this rank."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.local, self.found = Locals(model), None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.found is None:
            self.sums = dict(self.local.sums)
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def trained(kind, folder, model, method):
    watch = Watch()
    trainer = Trainer(
        model=model,
        args=arguments(
            folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_grad_norm=0.0,
            optim_args="polar_dtype=float32",
            **launcher(kind),
        ),
        train_dataset=tiny_data(),
        callbacks=[watch, RobustAggregation(method)],
    )
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    first = {"local": watch.sums, "found": watch.found, "weights": weights}
    trainer.args.max_steps = 6
    trainer.train()  # the Trainer may keep its wrapped model
    return first


def regression(seed, method, factor, steps=40):
    """Mean square distance from the teacher after training a linear map by Muon under DDP."""
    torch.manual_seed(seed)
    teacher, start = torch.randn(16, 24), torch.randn(16, 24)
    model = nn.Linear(24, 16, bias=False)
    model.weight.data.copy_(start)
    Locals(model, factor)
    wrapped = DistributedDataParallel(model)
    if METHODS[method]:
        make_robust(wrapped, Robust(method))
    optimizer = Muon(list(model.parameters()), lr=0.5, weight_decay=0.0, replicate_group="world")
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for _ in range(steps):
        x = torch.randn(32, 24, generator=generator)
        y = x @ teacher.T + torch.randn(32, 16, generator=generator)
        (wrapped(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return (model.weight - teacher).square().mean().item()


def refused(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def another_hook():
    wrapped = DistributedDataParallel(mlp())
    wrapped.register_comm_hook(None, lambda state, bucket: None)
    make_robust(wrapped, Robust())


def on_ddp(folder):
    dist.init_process_group("gloo")
    saved = {
        (method, name): gradients(method, factor, micro_batches, dtype)
        for method in METHODS
        for name, factor, micro_batches, dtype in (
            ("clean", 1.0, 1, torch.float32),
            ("attacked", ATTACK, 1, torch.float32),
            ("accumulated", ATTACK, 3, torch.float32),
            ("bfloat16", ATTACK, 1, torch.bfloat16),
            ("NaN", torch.nan, 1, torch.float32),
        )
    }
    for name, method, factor in (
        ("clean", "mean", 1.0),
        ("clean median", "median", 1.0),
        ("median", "median", ATTACK),
        ("trimmed_mean", "trimmed_mean", ATTACK),
        ("multi_krum", "multi_krum", ATTACK),
        ("mean", "mean", ATTACK),
    ):
        saved["regression", name] = [regression(seed, method, factor) for seed in range(3)]
    too_many = Robust("trimmed_mean", 2)
    saved["trim"] = refused(lambda: make_robust(DistributedDataParallel(mlp()), too_many))
    saved["hook"] = refused(another_hook)
    saved["again"] = make_robust(once := DistributedDataParallel(mlp()), Robust())
    saved["again"] = make_robust(once, Robust("trimmed_mean")) is saved["again"]
    saved["llama"] = trained("ddp", folder, tiny_llama(), "median")
    saved["lora"] = trained("ddp", folder, lora(folder, 0), "trimmed_mean")
    return saved


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if kind.startswith("zero"):
        import os

        import deepspeed

        os.environ["ACCELERATE_USE_CPU"] = "false"  # as in train.py
        deepspeed.init_distributed("gloo")
    if kind == "ddp":
        saved = on_ddp(folder)
    else:
        saved = {"refused": refused(lambda: trained(kind, folder, tiny_llama(), "median"))}
    torch.save(saved, folder / f"rank{dist.get_rank()}.pt")
    leave_together()
