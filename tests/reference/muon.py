"""Muon in float64, one matrix at a time, with exact polar factors: the oracle of the fast step."""

import math

import torch


def exact_polar(x):
    """UVᵀ of the thin SVD; directions without a singular value are left out."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    keep = s > s.max() * 1e-12
    return u[:, keep] @ vh[keep]


STEP_SIZES = {
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "original": lambda m, n: math.sqrt(max(1, m / n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}


def muon(
    weight,
    gradients,
    *,
    order,
    lr,
    momentum=0.95,
    nesterov=True,
    weight_decay=0.0,
    adjust_lr="match_rms_adamw",
    match_update_rms=False,
    cautious=False,
    polar=exact_polar,
):
    """The weight after one step for each gradient, in float64."""
    w = weight.double().clone()
    m, n = w.shape
    average = torch.zeros_like(w)

    def momentum_filter(x):
        nonlocal average
        average = momentum * average + (1 - momentum) * x
        return (1 - momentum) * x + momentum * average if nesterov else average

    for gradient in gradients:
        g = gradient.double()
        if order == "pre_polar":
            update = polar(momentum_filter(g))
        elif order == "post_polar":
            update = momentum_filter(polar(g))
        else:
            update = polar(g)
        if match_update_rms and update.norm() > 0:
            update = update / update.square().mean().sqrt() / math.sqrt(max(m, n))
        decayed = w * ((update * w > 0) if cautious else 1.0)
        w = w - lr * weight_decay * decayed - lr * STEP_SIZES[adjust_lr](m, n) * update
    return w
