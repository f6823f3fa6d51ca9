"""Optimizers with separate rates for matrices, for embeddings and head, and for the rest.

In: a model, three rates, settings; in a recipe, rates beside the Trainer's. Out: AdamW or Muon.
Both have the groups of Muon's routing, and differ only in what trains the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hf_muon import MuonConfig, MuonOptimizerFactory, route
from hf_muon.integrations.names import NAMES as FAMILY
from shared.arguments import RecipeError

ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass
class RateSettings:
    """Learning rates besides that of the stock arguments."""

    other_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Rate of embeddings, head and norms, under Muon and AdamW; --learning_rate "
            "then is that of the hidden matrices. By default there is one rate."
        },
    )
    lr_multipliers: str | None = field(
        default=None,
        metadata={
            "help": "PATTERN:FACTOR, separated by |: multiplies the rates of parameters by name, "
            "under Muon and AdamW; lora_B:4 trains B at four times the rate of A."
        },
    )


MEANT_BY = {"other_learning_rate": "adamw_lr", "lr_multipliers": "lr_multipliers"}
"""The setting of Muon that each field of :class:`RateSettings` becomes."""


def pass_rates(values: dict[str, Any]) -> None:
    """Pass the rates to Muon; raise if they would have no effect."""
    optim = getattr(values["optim"], "value", values["optim"])
    factors = values["lr_multipliers"]
    if factors is not None and ("," in factors or not factors.strip()):
        raise RecipeError(
            f"lr_multipliers={factors!r}: PATTERN:FACTOR is expected, separated by |, without "
            "commas."
        )
    if optim in ADAMW:
        return
    for field_name, setting in MEANT_BY.items():
        value, given = values[field_name], values["optim_args"] or ""
        if value is None:
            continue
        if optim not in FAMILY:
            raise RecipeError(
                f"{field_name}={value} needs Muon or AdamW, but optim={optim!r} was asked for."
            )
        if setting in given:
            raise RecipeError(
                f"{field_name}={value} and optim_args={given!r} both say what {setting} is: give "
                "one of them."
            )
        values["optim_args"] = ",".join(filter(None, (given, f"{setting}={value}")))


def adamw_at_rates(
    args: TrainingArguments, settings: RateSettings
) -> tuple[type, dict[str, Any]] | None:
    """Return the argument for ``Trainer(optimizer_cls_and_kwargs=…)``; None if one rate serves."""
    if args.optim not in ADAMW or settings == RateSettings():
        return None
    factors = settings.lr_multipliers
    config = MuonConfig.from_optim_args(
        f"lr_multipliers={factors}" if factors else None,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        adamw_betas=(args.adam_beta1, args.adam_beta2),
        adamw_eps=args.adam_epsilon,
    )
    other = settings.other_learning_rate
    other = args.learning_rate if other is None else other
    return AdamWAtRates, {"rates": Rates(args.learning_rate, other, other), "config": config}


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
    """Return the groups of Muon's routing at the three rates, times ``lr_multipliers``."""
    groups = []
    for group in route(model, config).param_groups(config):
        factor = group.get("lr_multiplier", 1)
        if group["algorithm"] == "muon":
            groups.append({**group, "lr": rates.matrices * factor})
            continue
        large = [(name, p) for name, p in group["params"] if p.dim() >= 2]
        small = [(name, p) for name, p in group["params"] if p.dim() < 2]
        for params, rate in ((large, rates.embeddings), (small, rates.rest)):
            if params:
                groups.append({**group, "params": params, "lr": rate * factor})
    return groups
