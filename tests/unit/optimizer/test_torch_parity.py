"""Settings that torch.optim.Muon and torch.optim.AdamW share give the same numbers."""

import copy

import pytest
import torch
from torch import nn

from hf_muon import Muon

MATCHED = {"polar_method": "newton_schulz", "coefficients": "quintic", "polar_dtype": "bfloat16"}
STEPS = 10


def train_both(start, gradients, *, adjust_lr, nesterov, weight_decay, **overrides):
    """(ours, torch's) weight after each gradient."""
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"weight_decay": weight_decay, "nesterov": nesterov, "momentum": 0.95}
    our_optimizer = Muon([ours], lr=0.02, adjust_lr=adjust_lr, **settings, **MATCHED, **overrides)
    their_optimizer = torch.optim.Muon([theirs], lr=0.02, adjust_lr_fn=adjust_lr, **settings)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        our_optimizer.step()
        their_optimizer.step()
        yield ours.detach().clone(), theirs.detach().clone()


# bfloat16 weights without Nesterov have a test of their own below.
@pytest.mark.parametrize(
    ("dtype", "nesterov"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 24), (24, 24), (1, 24)])
def test_wide_square_and_one_row_matrices_are_bitwise_equal(
    shape, adjust_lr, nesterov, weight_decay, dtype
):
    start = torch.randn(shape).to(dtype)
    gradients = [torch.randn(shape).to(dtype) for _ in range(STEPS)]
    settings = {"adjust_lr": adjust_lr, "nesterov": nesterov, "weight_decay": weight_decay}
    for ours, theirs in train_both(start, gradients, momentum_dtype=plain(dtype), **settings):
        assert torch.equal(ours, theirs)


def plain(dtype):
    """Ask for the bfloat16 buffer that torch.optim.Muon has, which silences our warning."""
    return "bfloat16" if dtype == torch.bfloat16 else None


def test_bfloat16_weights_without_nesterov_agree_until_torch_overwrites_its_buffer():
    # torch 2.13 normalizes ``grad.bfloat16()`` in place; where the input is bfloat16 already and
    # Nesterov makes no copy, that is the momentum buffer. Ours is left alone.
    start = torch.randn(16, 24).bfloat16()
    gradients = [torch.randn(16, 24).bfloat16() for _ in range(2)]
    settings = {"adjust_lr": "original", "nesterov": False, "weight_decay": 0.0}
    first, second = train_both(start, gradients, momentum_dtype="bfloat16", **settings)
    assert torch.equal(*first)
    assert not torch.equal(*second)
    theirs = nn.Parameter(start.clone())
    theirs.grad = gradients[0].clone()
    optimizer = torch.optim.Muon([theirs], lr=0.02, nesterov=False)
    optimizer.step()
    buffer, average = optimizer.state[theirs]["momentum_buffer"], 0.05 * gradients[0]
    assert float(buffer.norm()) == pytest.approx(1, rel=0.01)
    assert float((buffer - average).norm()) > 0.01


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(24, 16), (64, 8)])
def test_tall_matrices_differ_by_rounding_only(shape, adjust_lr, nesterov):
    # torch multiplies a strided transpose, ours a contiguous one: kernels differ, and bfloat16
    # keeps 8 bits. The update of each step may differ by that much.
    start, gradients = torch.zeros(shape), [torch.randn(shape) for _ in range(STEPS)]
    settings = {"adjust_lr": adjust_lr, "nesterov": nesterov, "weight_decay": 0.0}
    before_ours = before_theirs = start
    for ours, theirs in train_both(start, gradients, **settings):
        our_update, their_update = ours - before_ours, theirs - before_theirs
        assert (our_update - their_update).norm() <= 2**-8 * their_update.norm()
        before_ours, before_theirs = ours, theirs


def test_other_coefficients_are_told_apart():
    start, gradients = torch.randn(16, 24), [torch.randn(16, 24)]
    ours = nn.Parameter(start.clone())
    ours.grad = gradients[0].clone()
    Muon([ours], lr=0.02, **{**MATCHED, "coefficients": "polar_express"}).step()
    settings = {"adjust_lr": "match_rms_adamw", "nesterov": True, "weight_decay": 0.0}
    theirs = next(train_both(start, gradients, **settings))[1]
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adamw_half_is_torch_adamw(dtype, fused):
    ours = [nn.Parameter(torch.randn(*shape).to(dtype)) for shape in ((7, 5), (11,), (3, 2, 4))]
    theirs = copy.deepcopy(ours)
    matrix = nn.Parameter(torch.randn(4, 6))
    hyper = {"betas": (0.9, 0.95), "eps": 1e-7}
    our_optimizer = Muon(
        [
            {
                "params": ours[:1],
                "algorithm": "adamw",
                "weight_decay": 0.1,
                "fused": fused,
                **hyper,
            },
            {
                "params": ours[1:],
                "algorithm": "adamw",
                "weight_decay": 0.0,
                "fused": fused,
                **hyper,
            },
            {"params": [matrix]},
        ],
        lr=0.01,
    )
    their_optimizer = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}],
        lr=0.01,
        fused=fused,
        **hyper,
    )
    for _ in range(STEPS):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape).to(dtype)
            b.grad = a.grad.clone()
        matrix.grad = torch.randn(4, 6)
        our_optimizer.step()
        their_optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(
            our_optimizer.state[a]["exp_avg_sq"], their_optimizer.state[b]["exp_avg_sq"]
        )
