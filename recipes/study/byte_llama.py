"""One training of a tiny byte-level LLaMA, given a rule's settings, a learning rate and a seed.

In: a run of plain values. Out: a dict of plain values: held-out loss, seconds, readings of the
gradients, state bytes. The model is written out in functions: at this size the passes of a
library's modules take longer than their arithmetic.

Learning rates warm up linearly over 5 % of the steps and then fall linearly to zero. AdamW trains
embeddings, head and norms at one rate, whatever trains the matrices.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from shared.measure import state_bytes
from torch import Tensor

import hf_muon
from study.readings import Watch
from study.records import Run

RECIPES = Path(__file__).parents[1]

BYTES, WIDTH, HEAD, LAYERS, LENGTH = 256, 64, 16, 2, 64
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
ADAMW = {"betas": (0.9, 0.99), "eps": 1e-10}
WARMUP = 0.05
HELD_OUT = 512
"""Sequences of the held-out loss, evenly spread."""
FREEDOM, SPIKE = 1.5, 1000.0
"""Degrees of freedom of heavy-tailed noise; how much too large one gradient is."""

Weights = dict[str, Tensor]


def sizes(name: str) -> tuple[int, int]:
    """Return tokens per step and number of steps from the name of a cell such as ``128x512``."""
    tokens, _, steps = name.partition("x")
    try:
        found = int(tokens), int(steps)
    except ValueError:
        raise SystemExit(
            f"error: --cells {name}: tokens x steps are expected, as 128x512."
        ) from None
    if found[0] % LENGTH or min(found) < 1:
        raise SystemExit(f"error: --cells {name}: tokens come in multiples of {LENGTH}.")
    return found


def multiple_of_head(text: str) -> int:
    """Return a width from the command line; a model has as many heads as fit into it."""
    if not text.isdecimal() or int(text) < HEAD or int(text) % HEAD:
        raise ArgumentTypeError(f"{text!r} is no multiple of {HEAD}, the width of a head.")
    return int(text)


@lru_cache
def texts(corpus: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes to train on, and those of the held-out documents."""
    sys.path.insert(0, str(RECIPES / "llama_pretrain"))
    try:
        import corpora
        from settings import DataSettings
    finally:
        del sys.path[0]
    split = corpora.load(DataSettings(corpus=corpus))
    train, held_out = (
        np.frombuffer("\n\n".join(document.text for document in half).encode(), dtype=np.uint8)
        for half in (split.train, split.validation)
    )
    return train, held_out


def sequences(text: np.ndarray, starts: np.ndarray) -> Tensor:
    """Return the sequences at ``starts``, each with the byte that follows it, (b, LENGTH + 1)."""
    return torch.from_numpy(text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int64))


def drawn(text: np.ndarray, rows: int, generator: np.random.Generator) -> Tensor:
    """Return random sequences, (rows, LENGTH + 1)."""
    return sequences(text, generator.integers(0, len(text) - LENGTH - 1, rows))


def new_weights(seed: int, width: int = WIDTH) -> Weights:
    """Draw the weights: normal with a standard deviation of 0.02; weights of norms are one."""
    generator = torch.Generator().manual_seed(seed)
    inner = 8 * width // 3
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}

    def normal(*shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).requires_grad_()

    weights = {"embedding": normal(BYTES, width), "head": normal(BYTES, width)}
    weights["norm"] = torch.ones(width, requires_grad=True)
    for layer in range(LAYERS):
        for norm in ("attention_norm", "mlp_norm"):
            weights[f"{layer}.{norm}"] = torch.ones(width, requires_grad=True)
        for name in MATRICES:
            weights[f"{layer}.{name}"] = normal(*shapes.get(name, (width, width)))
    return weights


def halves(weights: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """Return the hidden matrices, and everything else."""
    matrices = [w for name, w in weights.items() if name.rpartition(".")[2] in MATRICES]
    others = [w for name, w in weights.items() if name.rpartition(".")[2] not in MATRICES]
    return matrices, others


def _angles() -> tuple[Tensor, Tensor]:
    half = HEAD // 2
    angles = torch.outer(torch.arange(LENGTH), 10_000.0 ** -(torch.arange(half) / half))
    return angles.cos(), angles.sin()


COSINES, SINES = _angles()


def rotated(x: Tensor) -> Tensor:
    """Rotate the two halves of each head by the angles of its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * COSINES - b * SINES, b * COSINES + a * SINES), dim=-1)


def loss_of(weights: Weights, rows: Tensor) -> Tensor:
    """Return the mean loss of the next byte, in nats."""
    width = weights["norm"].shape
    x = F.embedding(rows[:, :-1], weights["embedding"])  # (b, LENGTH, width)
    for layer in range(LAYERS):
        of = {
            name: weights[f"{layer}.{name}"] for name in (*MATRICES, "attention_norm", "mlp_norm")
        }
        x = x + attention(F.rms_norm(x, width, of["attention_norm"], 1e-6), of)
        h = F.rms_norm(x, width, of["mlp_norm"], 1e-6)
        inner = F.silu(F.linear(h, of["gate"])) * F.linear(h, of["up"])
        x = x + F.linear(inner, of["down"])
    logits = F.linear(F.rms_norm(x, width, weights["norm"], 1e-6), weights["head"])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def attention(h: Tensor, of: Mapping[str, Tensor]) -> Tensor:
    """Return causal attention with rotary positions, (b, LENGTH, width)."""
    q, k, v = (
        F.linear(h, of[name]).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    return F.linear(mixed.transpose(1, 2).flatten(2), of["out"])


@torch.no_grad()
def held_out_loss(weights: Weights, text: np.ndarray) -> float:
    """Return the mean loss of evenly spread held-out sequences."""
    rows = sequences(text, np.linspace(0, len(text) - LENGTH - 2, HELD_OUT).astype(int))
    return float(torch.stack([loss_of(weights, part) for part in rows.split(64)]).mean())


class Optimizer:
    """Muon or AdamW on the matrices, AdamW on the rest; each step scales the peak rates."""

    def __init__(self, run: Run, matrices: list[Tensor], others: list[Tensor]) -> None:
        searched = dict(run.point)
        rate = searched.pop("rate")
        rate_of_others = searched.pop("adamw_rate", run.cell.get("adamw_rate"))
        settings = {"polar_dtype": "float32", **run.settings, **searched}
        if settings.pop("optimizer") == "adamw":
            betas = (settings.pop("momentum", ADAMW["betas"][0]), ADAMW["betas"][1])
            own = {**ADAMW, "betas": betas, "weight_decay": 0.0, "fused": True}
            self.of_matrices: torch.optim.Optimizer = torch.optim.AdamW(matrices, lr=rate, **own)
        else:
            self.of_matrices = hf_muon.Muon(matrices, lr=rate, **settings)
        rest = {"lr": rate_of_others, "weight_decay": 0.0, "fused": True}
        self.of_others = torch.optim.AdamW(others, **rest, **ADAMW)
        self._rates = ((self.of_matrices, rate), (self.of_others, rate_of_others))

    def step(self, factor: float) -> None:
        """Step both optimizers at ``factor`` times their peak rates, and drop the gradients."""
        for optimizer, rate in self._rates:
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
            optimizer.step()
            optimizer.zero_grad()


def rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak rate: a linear rise, then a linear fall to zero."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


def heavy_noise(matrices: list[Tensor], scale: float, seed: int) -> Callable[[int], None]:
    """Return a function that adds Student's t noise to gradients (polar method, Bailey, 1994)."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(_: int) -> None:
        for matrix in matrices:
            u, v = torch.rand((2, *matrix.shape), generator=generator).clamp_(min=1e-7)
            t = (FREEDOM * (u ** (-2 / FREEDOM) - 1)).sqrt_() * (2 * math.pi * v).cos_()
            matrix.grad.add_(t, alpha=scale * float(matrix.grad.square().mean().sqrt()))

    return disturb


def white_noise(matrices: list[Tensor], scale: float, seed: int) -> Callable[[int], None]:
    """Return a function that adds normal noise of ``scale`` times each gradient's norm."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(_: int) -> None:
        for matrix in matrices:
            drawn = torch.randn(matrix.shape, generator=generator)
            matrix.grad.add_(drawn, alpha=scale * float(matrix.grad.square().mean().sqrt()))

    return disturb


def spike(matrices: list[Tensor], at: int) -> Callable[[int], None]:
    """Return a function that makes the gradients of one step far too large."""

    def disturb(step: int) -> None:
        for matrix in matrices if step == at else ():
            matrix.grad.mul_(SPIKE)

    return disturb


ADDED = {"heavy": heavy_noise, "white": white_noise}


def disturbance(run: Run, matrices: list[Tensor]) -> Callable[[int], None]:
    """Return the function that disturbs the gradients before each step of a run."""
    noise = run.cell["noise"]
    if noise in ADDED:
        return ADDED[noise](matrices, run.cell["noise_scale"], run.seed)
    return spike(matrices, run.cell["steps"] // 2 if noise == "spike" else -1)


def train(run: Run) -> dict[str, Any]:
    """Train once.

    Args:
        run: its settings are fields of ``MuonConfig``, and ``optimizer``, ``muon`` or ``adamw`` for
            the matrices; with ``adamw``, ``momentum`` is β₁. Its point has the peak ``rate`` of the
            matrices and further settings. Its cell has

            * ``tokens`` per step, a multiple of the sequence length, and ``steps``,
            * ``width`` of the model, a multiple of 16; 64 by default,
            * ``adamw_rate``, the peak rate of everything else, unless the point has it,
            * ``noise`` in the gradients of the matrices: ``none``; ``heavy``, Student's t with 1.5
              degrees of freedom in every step; ``white``, normal in every step; ``spike``, one step
              with gradients 1000 times as large,
            * ``noise_scale`` of ``heavy`` and ``white``, relative to each gradient's RMS,
            * ``corpus``, as the pretraining recipe names it.

    Returns:
        ``loss`` (None if the run diverged); ``seconds`` of CPU time; ``nsr`` and ``readings`` by
        place in the run (see :mod:`study.readings`); and ``state_bytes`` per entry of the matrices.
    """
    torch.set_num_threads(1)
    text, held_out = texts(run.cell["corpus"])
    started = time.process_time()
    weights = new_weights(run.seed, run.cell.get("width", WIDTH))
    matrices, others = halves(weights)
    optimizer = Optimizer(run, matrices, others)
    disturb, order = disturbance(run, matrices), np.random.default_rng(run.seed)
    steps, rows = run.cell["steps"], run.cell["tokens"] // LENGTH
    watch, others_order = Watch(steps), np.random.default_rng(77)

    def again() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(weights, drawn(text, rows, others_order)), matrices)

    entries, loss = sum(matrix.numel() for matrix in matrices), math.inf
    try:
        for step in range(steps):
            loss_of(weights, drawn(text, rows, order)).backward()
            disturb(step)
            watch.see(step, [matrix.grad for matrix in matrices], again)
            optimizer.step(rate_factor(step, steps))
        loss = held_out_loss(weights, held_out)
    except FloatingPointError:  # hf_muon raises it for gradients with NaN
        pass
    return {
        "loss": loss if math.isfinite(loss) else None,
        "seconds": round(time.process_time() - started, 2),
        "nsr": watch.noise_to_signal,
        "readings": watch.found,
        "state_bytes": round(state_bytes(optimizer.of_matrices) / entries, 3),
    }
