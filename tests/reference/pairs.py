"""Adapter pairs of several shapes, as groups for the optimizer, and their training in a plain loop.

The loop goes pair by pair and expert by expert and calls nothing but the pure updates of a pair,
which have float64 oracles of their own in ``lora``.
"""

import math
from functools import partial

import torch
from torch import nn

from hf_muon.distributed.layout import Matrix
from hf_muon.optimizer.lora import Pair, pair_step_size, product_update
from hf_muon.optimizer.lora_tangent import balance_factor, tangent_update
from hf_muon.optimizer.step import polar_function

# name -> (m, n, r, c, number of experts); rank 1 and an expert stack with strided B among them.
ADAPTERS = {
    "q": (64, 64, 4, 2.0, 1),
    "up": (112, 64, 8, 0.5, 1),
    "down": (64, 112, 16, -2.0, 1),
    "thin": (24, 40, 1, 1.0, 1),
    "experts": (28, 20, 4, 2.0, 3),
}


def parameters(dtype=torch.float32, uneven=1.0):
    """A and B of each adapter by name, B = 0 in the first of them as PEFT starts.

    ``uneven`` multiplies every A and divides every B.
    """
    generator = torch.Generator().manual_seed(0)
    named = {}
    for name, (m, n, r, _, experts) in ADAPTERS.items():
        A = torch.randn(experts * r, n, generator=generator) * uneven / math.sqrt(n)
        B = torch.randn(m, r * experts, generator=generator) / (uneven * math.sqrt(m))
        named[f"{name}_A"] = nn.Parameter(A.to(dtype))
        named[f"{name}_B"] = nn.Parameter((0 * B if name == "q" else B).to(dtype))
    return named


def regions(name):
    """The matrices of A or B: those of an expert are rows of A, and every third column of B."""
    m, n, r, _, experts = ADAPTERS[name[:-2]]
    if name.endswith("A"):
        return tuple((e * r * n, (r, n), (n, 1), 0) for e in range(experts))
    return tuple((e, (m, r), (r * experts, experts), 0) for e in range(experts))


def expert(name, tensor, e):
    """What the region says, written as PEFT writes it."""
    m, n, r, _, experts = ADAPTERS[name[:-2]]
    if name.endswith("A"):
        return tensor.view(experts, r, n)[e]
    return tensor.view(m, r, experts)[..., e]


def group_of(named, **settings):
    other = {"A": "B", "B": "A"}
    return {
        "params": list(named.items()),
        "matrices": tuple(map(regions, named)),
        "pairs": tuple(name[:-1] + other[name[-1]] for name in named),
        "factors": tuple(name[-1] for name in named),
        "scalings": tuple(ADAPTERS[name[:-2]][3] for name in named),
        **settings,
    }


def gradients(named, step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in named.items()}


def by_loop(named, update, steps, balance_every=0, nesterov=True, momentum=0.95):
    """The same training, pair by pair and expert by expert, with nothing but the pure updates."""
    settings = {"polar_method": "auto", "coefficients": "tight", "polar_steps": 5}
    own = {"polar_dtype": "float32", "polar_kernel": "auto", "compile": False}
    polar = polar_function({**settings, **own})
    function = product_update if update == "product" else partial(tangent_update, iterations=3)
    weights = {name: p.detach().clone() for name, p in named.items()}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(steps):
        given = gradients(named, step)
        for name, (m, n, r, c, experts) in ADAPTERS.items():
            size = pair_step_size("match_rms_adamw", Matrix.whole((r, n)), Matrix.whole((m, r)), c)
            for e in range(experts):
                names = Pair(f"{name}_A", f"{name}_B")
                W, M, G = (
                    Pair(*(expert(one, of[one], e) for one in names))
                    for of in (weights, momenta, given)
                )
                for buffer, gradient in zip(M, G, strict=True):
                    buffer.lerp_(gradient, 1 - momentum)
                seen = M
                if nesterov:
                    seen = Pair(*(g.lerp(b, momentum) for g, b in zip(G, M, strict=True)))
                change = function(
                    Pair(*(w[None].contiguous() for w in W)),
                    Pair(*(g[None].contiguous() for g in seen)),
                    step=0.02 * size, decay=0.02 * 0.1, damping=1e-2, polar=polar,
                )  # fmt: skip
                for weight, moved in zip(W, change, strict=True):
                    weight.add_(moved[0])
                if balance_every and (step + 1) % balance_every == 0:
                    f = balance_factor(*(w.double().square().sum() for w in W))
                    for weight, buffer, by in zip(W, M, (f, 1 / f), strict=True):
                        weight.mul_(by)
                        buffer.div_(by)
    return weights
