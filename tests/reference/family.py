"""The filters, maps, rescalings and writes by their formulas, in float64, one matrix at a time."""

import math

import torch

from tests.reference.muon import exact_polar


def kernel(momenta, weights, nesterov=True):
    """Σ w_k·m_k for averages m_k; with Nesterov (1−μ)X + μM, μ = Σ w_k·β_k."""
    averages = [0.0] * len(momenta)
    mu = sum(w * beta for w, beta in zip(weights, momenta, strict=True))

    def run(x):
        for k, beta in enumerate(momenta):
            averages[k] = beta * averages[k] + (1 - beta) * x
        mixed = sum(w * average for w, average in zip(weights, averages, strict=True))
        return (1 - mu) * x + mu * mixed if nesterov else mixed

    return run


def changing(momenta):
    """(1−β_t)X + β_t·M for an average whose β is another one in each step."""
    average, step = 0.0, 0

    def run(x):
        nonlocal average, step
        beta = momenta[step]
        step += 1
        average = beta * average + (1 - beta) * x
        return (1 - beta) * x + beta * average

    return run


def clip(threshold, rate=0.1):
    """Entries cut at ±threshold·s, where s follows the median of abs(x) by the share above it."""
    median = None

    def run(x):
        nonlocal median
        size = x.abs()[x != 0]
        if median is None:
            median = size.mean() * 0.6744897501960817 / math.sqrt(2 / math.pi)
        else:
            median = median * math.exp(rate * (2 * float((size > median).double().mean()) - 1))
        return x.clamp(-threshold * median, threshold * median)

    return run


def norm(x):
    return x / x.norm()


def polargrad(x):
    return torch.linalg.svdvals(x).sum() * exact_polar(x)


def soft(power):
    def run(x):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u @ torch.diag((s / s[0]) ** power) @ vh

    return run


def rows(beta=0.95, eps=1e-8):
    average = 0.0

    def run(x):
        nonlocal average
        average = beta * average + (1 - beta) * x.square().mean(1)
        divided = torch.stack([row / (v.sqrt() + eps) for row, v in zip(x, average, strict=True)])
        return divided * x.norm() / divided.norm()

    return run


def entries(beta=0.95, eps=1e-8):
    average, step = 0.0, 0

    def run(x):
        nonlocal average, step
        step += 1
        average = beta * average + (1 - beta) * x.square()
        divided = x / ((average / (1 - beta**step)).sqrt() + eps)
        return divided * x.norm() / divided.norm()

    return run


def frobenius(x):
    return x * min(x.shape) ** 0.5 / x.norm()


def additive(w, update, lr, scale):
    return w - lr * scale * update


def relative(w, update, lr, scale):
    return w - lr * update * w.norm() / update.norm()


def hyperball(w, update, lr, scale):
    radius = w.norm()  # which no step changes
    moved = w - lr * radius * update / update.norm()
    return radius * moved / moved.norm()


def train(weight, gradients, stages, lr, scale, write=additive):
    """The weight after stages that follow each other, one step for each gradient."""
    w = weight.double()
    for gradient in gradients:
        update = gradient.double()
        for stage in stages:
            update = stage(update)
        w = write(w, update, lr, scale)
    return w
