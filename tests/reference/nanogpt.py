"""nanoGPT's model and loop for CPUs, written out plainly.

In: weights of a GPT-2 without biases, and batches. Out: the weights after training on them, with
the weight decay of February 2023, 0.01, on embeddings too.
https://github.com/karpathy/nanoGPT (model.py, train.py, config/train_shakespeare_char.py)
"""

import math

import torch
from torch.nn import functional as F

HEADS, WARMUP, PEAK, SMALLEST = 4, 100, 1e-3, 1e-4


def loss_of(weights, x, y):
    """Mean loss of the next character; ``weights`` by the names of nanoGPT, all (out, in)."""
    h = weights["wte"][x] + weights["wpe"][: x.shape[1]]  # (b, t, c)
    layers = sum(name.endswith("c_attn") for name in weights)
    for layer in range(layers):
        of = {name: weights[f"{layer}.{name}"] for name in
              ("ln_1", "c_attn", "attn.c_proj", "ln_2", "c_fc", "mlp.c_proj")}  # fmt: skip
        q, k, v = F.linear(normed(h, of["ln_1"]), of["c_attn"]).chunk(3, dim=-1)
        h = h + F.linear(attention(q, k, v), of["attn.c_proj"])
        inner = F.gelu(F.linear(normed(h, of["ln_2"]), of["c_fc"]))
        h = h + F.linear(inner, of["mlp.c_proj"])
    logits = F.linear(normed(h, weights["ln_f"]), weights["wte"])
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def normed(x, weight):
    return F.layer_norm(x, weight.shape, weight, None, 1e-5)


def attention(q, k, v):
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
    return mixed.transpose(1, 2).flatten(2)


def rate(step, steps):
    """The learning rate of an iteration: a rise over 5 % of the steps, a cosine to a tenth."""
    warmup = WARMUP * steps // 2000
    if step < warmup:
        return PEAK * step / warmup
    share = (step - warmup) / (steps - warmup)
    return SMALLEST + 0.5 * (1 + math.cos(math.pi * share)) * (PEAK - SMALLEST)


def train(weights, batches):
    """Train on batches of (x, y), in place; matrices and embeddings decay, norms do not."""
    parts = [[w for w in weights.values() if (w.dim() >= 2) is decays] for decays in (True, False)]
    groups = [
        {"params": part, "weight_decay": d} for part, d in zip(parts, (0.01, 0.0), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99))
    for step, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, len(batches))
        loss_of(weights, x, y).backward()
        torch.nn.utils.clip_grad_norm_([*weights.values()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
