"""One training in a domain, in a loop of plain PyTorch.

In: a run of the study. Out: the held-out loss, the metrics of the domain, and CPU seconds. Learning
rates rise linearly over 5 % of the steps and then fall linearly to zero; gradients are clipped to a
norm of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from domain import Domain
from recommendation import movielens
from shared.rates import Rates, adamw_at, muon_at
from speech import vowels
from study.records import Run
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from vision import digits, mnist, of_images, shifted

from hf_muon import MuonConfig

DOMAINS: dict[str, Callable[[], Domain]] = {
    "mnist": lambda: of_images(mnist(), patch=4, steps=500),
    "mnist, shifted": lambda: of_images(mnist(), patch=4, steps=500, augment=shifted),
    "digits": lambda: of_images(digits(), patch=2, steps=330),
    "vowels": vowels,
    "movielens": movielens,
}
WARMUP, BETA2, CLIP = 0.05, 0.99, 1.0


@cache
def domain_of(name: str) -> Domain:
    """Return a domain; its files are read only once."""
    return DOMAINS[name]()


def optimizer_of(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Return the optimizer of a run: AdamW or Muon on the matrices, AdamW on the rest."""
    settings, point = dict(run.settings), run.point
    rates = Rates(point["rate"], point["other_rate"], point["other_rate"])
    common = {"lr": rates.matrices, "weight_decay": point["weight_decay"]}
    if settings.pop("optimizer") == "adamw":
        return adamw_at(model, rates, MuonConfig(**common, adamw_betas=(0.9, BETA2)))
    return muon_at(model, rates, MuonConfig(**common, adamw_betas=(0.9, BETA2), **settings))


def factor(step: int, steps: int) -> float:
    """Return the share of the peak rate at a step."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def train(run: Run) -> dict[str, Any]:
    """Train once; the cell has the name of the ``domain`` and the number of ``steps``.

    Returns:
        ``loss`` (None if the run diverged), the metrics of the domain, ``seconds`` of CPU time.
    """
    torch.set_num_threads(1)
    domain, steps = domain_of(run.cell["domain"]), run.cell["steps"]
    started = time.process_time()
    torch.manual_seed(run.seed)
    model, order = domain.model(), torch.Generator().manual_seed(run.seed)
    optimizer = optimizer_of(model, run)
    schedule = LambdaLR(optimizer, partial(factor, steps=steps))
    found: dict[str, Any] = {"loss": None}
    try:
        for _ in range(steps):
            inputs, targets = domain.drawn(order)
            domain.loss(model(inputs), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        found = {name: round(value, 5) for name, value in domain.worth(model).items()}
    except FloatingPointError:  # hf_muon raises it for gradients with NaN
        pass
    if not math.isfinite(found["loss"] or 0.0):
        found["loss"] = None
    return {**found, "seconds": round(time.process_time() - started, 1)}
