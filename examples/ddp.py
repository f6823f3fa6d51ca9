"""Muon in a plain PyTorch loop under DDP: the ranks divide the polar factors among themselves.

torchrun --nproc_per_node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_muon import create_muon_optimizer

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")

torch.manual_seed(0)  # the same weights and targets on all ranks
layers = nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
model = DistributedDataParallel(nn.Sequential(*layers).to(device))
target = torch.randn(16, 4)
x = torch.randn(512, 16, generator=torch.Generator().manual_seed(rank))  # each rank has its data
x, y = x.to(device), (x @ target).argmax(dim=1).to(device)

# "world": every rank holds a copy of each parameter. With FSDP2, leave it out.
settings = {"lr": 1e-2, "weight_decay": 0.1, "adamw_params": (r"4\.weight",)}  # the head
optimizer = create_muon_optimizer(model, replicate_group="world", **settings)
losses = []
for _ in range(40):
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

if rank == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
dist.destroy_process_group()
