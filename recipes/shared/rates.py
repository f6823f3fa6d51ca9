"""Optimizers with a rate of their own for matrices, for embeddings and head, and for the rest.

In: a model, three rates, settings. Out: AdamW or Muon. They differ in nothing but what trains the
matrices: both have the groups of Muon's routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_muon import MuonConfig, MuonOptimizerFactory, route


@dataclass(frozen=True)
class Rates:
    """Peak learning rates.

    Attributes:
        matrices: of the hidden matrices, those that Muon trains.
        embeddings: of embeddings, heads, and whatever else has two dimensions or more.
        rest: of norms and biases.
    """

    matrices: float
    embeddings: float
    rest: float


class AdamWAtRates:
    """Builds AdamW, in the form of ``Trainer(optimizer_cls_and_kwargs=…)``."""

    def __call__(self, model: nn.Module, rates: Rates, config: MuonConfig) -> torch.optim.AdamW:
        """Build the optimizer of a model."""
        return adamw_at(model, rates, config)


def adamw_at(model: nn.Module, rates: Rates, config: MuonConfig) -> torch.optim.AdamW:
    """Return torch's AdamW on everything, with the decay, ``adamw_betas`` and eps of ``config``."""
    groups = [
        {"params": group["params"], "lr": group["lr"], "weight_decay": group["weight_decay"]}
        for group in groups_at(model, rates, config)
    ]
    betas, eps = config.adamw_betas, config.adamw_eps
    return torch.optim.AdamW(groups, lr=rates.matrices, betas=betas, eps=eps, fused=True)


def muon_at(model: nn.Module, rates: Rates, config: MuonConfig) -> torch.optim.Optimizer:
    """Return Muon on the matrices, and AdamW on the others."""
    return MuonOptimizerFactory(groups_at(model, rates, config), config=config)


def groups_at(model: nn.Module, rates: Rates, config: MuonConfig) -> list[dict[str, Any]]:
    """Return the groups of Muon's routing, cut by the three rates."""
    groups = []
    for group in route(model, config).param_groups(config):
        if group["algorithm"] == "muon":
            groups.append({**group, "lr": rates.matrices})
            continue
        large = [(name, p) for name, p in group["params"] if p.dim() >= 2]
        small = [(name, p) for name, p in group["params"] if p.dim() < 2]
        for params, rate in ((large, rates.embeddings), (small, rates.rest)):
            if params:
                groups.append({**group, "params": params, "lr": rate})
    return groups
