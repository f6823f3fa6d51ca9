"""The write: weights of zero, which have no norm to go by; norms that stay; momenta of zero."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from hf_muon import Muon
from tests.unit.optimizer.test_family import LR, draw, trained

RULES = ["hyperball", "relative"]
REFUSED = "A matrix of zeros cannot be trained"


def weights_and_copies():
    weights = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4, 4))]
    return weights, [w.detach().clone() for w in weights]


def stepped(optimizer, weights):
    for w in weights:
        w.grad = torch.randn(4, 4)
    optimizer.step()


@pytest.mark.parametrize("step_rule", RULES)
def test_a_matrix_of_zeros_is_refused_and_nothing_changes(step_rule):
    weights, before = weights_and_copies()
    optimizer = Muon(weights, lr=LR, step_rule=step_rule)
    with pytest.raises(ValueError, match=f"{REFUSED} with step_rule='{step_rule}'"):
        stepped(optimizer, weights)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("step_rule", RULES)
def test_zeros_pass_at_a_rate_of_zero_and_not_after_it(step_rule):
    weights, before = weights_and_copies()
    optimizer = Muon(weights, lr=0.0, step_rule=step_rule)
    for lr, expected in ((0.0, nullcontext()), (LR, pytest.raises(ValueError, match=REFUSED))):
        optimizer.param_groups[0]["lr"] = lr
        with expected:
            stepped(optimizer, weights)
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_momenta_of_zero_are_momenta():
    start, gradients = torch.randn(4, 6), [torch.randn(4, 6) for _ in range(2)]
    found = []
    for group, settings in (({"momenta": (0.0,)}, {}), ({}, {"momentum": 0.0})):
        weight = nn.Parameter(start.clone())
        optimizer = Muon([{"params": [weight], **group}], lr=LR, **settings)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_hyperball_turns_and_keeps_the_norm():
    start, gradients = draw(20, 12, steps=1000)
    weight, _ = trained(start, gradients, step_rule="hyperball", polar_method="auto")
    assert float(weight.norm() / start.norm()) == pytest.approx(1, abs=1e-6)
    # An update at right angles to W turns it by cos = 1/√(1 + η²).
    one, _ = trained(torch.eye(8), [torch.eye(8).roll(1, 0)], step_rule="hyperball", lr=0.3)
    cosine = float((one * torch.eye(8)).sum() / (one.norm() * 8**0.5))
    assert cosine == pytest.approx(1 / math.sqrt(1 + 0.3**2), abs=1e-6)


def test_relative_changes_a_share_of_the_weight():
    start, gradients = draw(20, 12, steps=1)
    weight, _ = trained(start, gradients, step_rule="relative", lr=0.01)
    assert float((weight - start).norm() / start.norm()) == pytest.approx(0.01, rel=1e-5)
