"""DDP with parameters that some ranks, or none, use: branches.py OUT."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_muon import create_muon_optimizer
from tests.distributed import layouts

STEPS = 4


class Branches(nn.Module):
    """Two experts behind a choice that the data makes, one that nobody uses, one frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(2))
        self.unused = nn.Linear(24, 24, bias=False)
        self.frozen = nn.Linear(24, 24, bias=False).requires_grad_(False)
        self.out = nn.Linear(24, 17)

    def forward(self, x, choice):
        return self.out(self.frozen(self.experts[choice](x))).square().mean()


def data(step, rank):
    """The input of a rank, and its choice: both experts, then the first only, then each its own."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, 24, generator=generator), (step * rank) % 2


def build(wrap=lambda model: model, **settings):
    model = Branches()
    optimizer = create_muon_optimizer(
        model, lr=0.01, weight_decay=0.1, polar_dtype="float32", **settings
    )
    return model, wrap(model), optimizer


def main(out):
    model, wrapped, optimizer = build(
        lambda model: DistributedDataParallel(model, find_unused_parameters=True),
        replicate_group="world",
        distribute="owner",
    )
    for step in range(STEPS):
        wrapped(*data(step, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [None, None]
    dist.all_gather_object(weights, layouts.full_weights(model))
    if dist.get_rank() == 0:
        steps = {n: int(s["step"]) for n, s in named_state(model, optimizer).items()}
        torch.save({"weights": weights, "steps": steps}, out)


def named_state(model, optimizer):
    return {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}


if __name__ == "__main__":
    with layouts.process_group():
        main(sys.argv[1])
