"""A short run of every update rule, on matrices of several shapes or on adapter pairs.

In: the name of a rule. Out: an optimizer, its weights, and gradients for three steps.
"""

import torch
from torch import nn

from hf_muon import Muon
from tests.reference.pairs import gradients, group_of, parameters

MATRICES = [(12, 20), (12, 20), (20, 12), (16, 16), (6, 40)]
RULES = {
    "default": {},
    "post_polar": {"order": "post_polar", "match_update_rms": True},
    "polar_only": {"order": "polar_only"},
    "bfloat16": {"polar_dtype": "bfloat16"},
    "svd": {"polar_method": "svd"},
    "two terms": {"momentum": (0.9, 0.98)},
    "auto": {"momentum": "auto"},
    "clip": {"prefilter": "clip"},
    "norm": {"prefilter": "norm"},
    "polargrad": {"matrix_map": "polargrad"},
    "soft": {"matrix_map": "soft"},
    "rows": {"rescale": "rows"},
    "rows behind": {"rescale": "rows", "order": "post_polar"},
    "entries": {"rescale": "entries"},
    "relative": {"step_rule": "relative"},
    "hyperball": {"step_rule": "hyperball", "weight_decay": 0.0},
    "int8": {"momentum_dtype": "int8"},
    "without zeros": {"skip_zero_gradients": True},
}
PAIRS = {
    "product": {"lora_update": "product"},
    "tangent": {"lora_update": "tangent", "tangent_balance_every": 2},
}


def run_of(name, copies=1, device="cpu"):
    """The run; with ``copies`` there are so many times the matrices."""
    return (
        _of_pairs(PAIRS[name], device)
        if name in PAIRS
        else _of_matrices(RULES[name], copies, device)
    )


def _of_matrices(settings, copies, device):
    torch.manual_seed(0)
    shapes = MATRICES * copies
    weights = [nn.Parameter(torch.randn(shape).to(device)) for shape in shapes]
    given = [[torch.randn(shape).to(device) for shape in shapes] for _ in range(3)]
    chosen = {"lr": 0.02, "weight_decay": 0.1, "adamw_lr": 1e-3, "polar_dtype": "float32"}
    optimizer = Muon(weights, **{**chosen, **settings})
    return optimizer, weights, given


def _of_pairs(settings, device):
    named = {n: nn.Parameter(p.detach().to(device)) for n, p in parameters(uneven=1e3).items()}
    steps = [gradients(named, step).values() for step in range(3)]
    given = [[gradient.to(device) for gradient in of_step] for of_step in steps]
    chosen = {"lr": 0.02, "weight_decay": 0.1, "polar_dtype": "float32"}
    return Muon([group_of(named)], **{**chosen, **settings}), list(named.values()), given
