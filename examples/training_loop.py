"""Muon in a plain PyTorch loop, with a schedule and a checkpoint.

python examples/training_loop.py
"""

from pathlib import Path

import torch
from torch import nn

from hf_muon import MuonConfig, create_muon_optimizer, route

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
x = torch.randn(512, 16)
y = (x @ torch.randn(16, 4)).argmax(dim=1)

# Muon trains the hidden matrices, AdamW the biases and, because it is named here, the head.
config = MuonConfig(lr=1e-2, weight_decay=0.1, adamw_params=(r"4\.weight",))
print(route(model, config).table())
optimizer = create_muon_optimizer(model, config)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)

losses = []
for _ in range(40):
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    losses.append(loss.item())

Path("out").mkdir(exist_ok=True)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "out/loop.pt")
optimizer.load_state_dict(torch.load("out/loop.pt")["optimizer"])  # with the momentum
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
