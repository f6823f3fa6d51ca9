"""Adapter pairs for tests, the updates under test, and what is measured of a step."""

import math
from functools import partial

import pytest
import torch

from hf_muon.optimizer.lora import Pair, product_update
from hf_muon.optimizer.lora_tangent import tangent_update
from hf_muon.polar import orthogonalize

EXACT = partial(orthogonalize, method="svd", coefficients="polar_express", steps=5, dtype="float32")
ITERATED = partial(EXACT, method="auto")
# float32 has 24 bits, 6e-8; Gram matrices, roots and the SVD lose a digit each.
FP32 = 1e-5

PRODUCT = partial(product_update, polar=EXACT, damping=1e-3, decay=0.0, step=0.1)
TANGENT = partial(tangent_update, polar=EXACT, damping=1e-3, decay=0.0, step=0.1, iterations=3)
UPDATES = pytest.mark.parametrize("update", [PRODUCT, TANGENT], ids=["product", "tangent"])


def factors(m=40, n=56, r=6, lead=()):
    """A and B with entries as in a trained adapter, and the gradient of the base weight."""
    A, B = torch.randn(*lead, r, n) / math.sqrt(n), torch.randn(*lead, m, r) / math.sqrt(m)
    return Pair(A, B), torch.randn(*lead, m, n)


def gradients_of(weights, G, c=1.0):
    return Pair(c * weights.b.mT @ G, c * G @ weights.a.mT)


def product(weights):
    return weights.b.double() @ weights.a.double()


def added(weights, change):
    return Pair(*(w.double() + d.double() for w, d in zip(weights, change, strict=True)))


def moved(weights, change):
    """The change of BA."""
    return product(added(weights, change)) - product(weights)


def spectral_norm(X):
    return torch.linalg.matrix_norm(X, 2).item()


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def change_error(weights, change, expected):
    """Error of what a factor moves by, the larger of the two."""
    new = [e - w.double() for w, e in zip(weights, expected, strict=True)]
    return max(error(d.double(), e) for d, e in zip(change, new, strict=True))
