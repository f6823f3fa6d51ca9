"""Updates of the rules in docs/extending.md, in float64, one matrix at a time."""

import torch

from tests.reference.muon import exact_polar


def ema(momentum=0.95):
    """(1−β)G + βM for the average M."""
    average = 0.0

    def run(x):
        nonlocal average
        average = momentum * average + (1 - momentum) * x
        return (1 - momentum) * x + momentum * average

    return run


def two_terms():
    averages = [0.0, 0.0]

    def run(x):
        averages[:] = [
            beta * one + (1 - beta) * x for beta, one in zip((0.9, 0.98), averages, strict=True)
        ]
        return 0.44 * averages[0] + 0.56 * averages[1]

    return run


def clipped():
    smooth = ema()
    return lambda x: smooth(x.clamp(-1, 1))


def polargrad(x):
    return torch.linalg.svdvals(x).sum() * exact_polar(x)


def rows():
    average = 0.0

    def run(x):
        nonlocal average
        average = 0.95 * average + 0.05 * x.square().mean(1)
        scaled = x / (average.sqrt() + 1e-8)[:, None]
        return scaled * x.norm() / scaled.norm()

    return run


def train(weight, gradients, stages, lr, scale):
    """The weight after stages that follow each other, one step for each gradient."""
    w = weight.double()
    for gradient in gradients:
        update = gradient.double()
        for stage in stages:
            update = stage(update)
        w = w - lr * scale * update
    return w
