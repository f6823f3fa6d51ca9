"""Momentum in one byte: how far off it is, and that nothing else reads it."""

import pytest
import torch
from torch import nn

from hf_muon import Muon
from tests.unit.optimizer.test_family import LR, draw, trained


@pytest.mark.parametrize("shape", [(5, 40), (3, 5000), (1, 2048), (4, 2049)])
def test_int8_momentum_is_off_by_a_254th_of_the_largest_of_its_block(shape):
    start, gradients = draw(*shape, steps=1)
    settings = {"momentum_dtype": "int8", "polar_method": "auto"}
    _, optimizer = trained(start, gradients, **settings)
    [state] = optimizer.state.values()
    exact, blocks = 0.05 * gradients[0], -(-shape[1] // 2048)
    assert state["exp_avg"].dtype == torch.int8
    assert state["exp_avg"].shape == shape
    assert state["exp_avg_scale"].shape == (1, shape[0], blocks)
    for block in range(blocks):
        columns = slice(2048 * block, 2048 * (block + 1))
        largest = exact[:, columns].abs().amax(1, keepdim=True)
        kept = state["exp_avg_scale"][0, :, block, None]
        assert torch.allclose(kept, largest, rtol=1e-6)
        error = (state["exp_avg"][:, columns] * kept / 127 - exact[:, columns]).abs()
        assert bool((error <= largest / 254 * 1.0001).all())


def test_int8_trains_like_float32():
    start, gradients = draw(30, 20)
    exact, _ = trained(start, gradients)
    coded, _ = trained(start, gradients, momentum_dtype="int8")
    assert 0 < (coded - exact).norm() < 0.05 * (exact - start).norm()


def test_the_momentum_dtype_of_a_checkpoint_is_used_and_named():
    start, gradients = draw(4, 6, steps=2)
    through, _ = trained(start, gradients, momentum_dtype="int8")
    halfway, coded = trained(start, gradients[:1], momentum_dtype="int8")
    weight = nn.Parameter(halfway.clone())
    wide = Muon([weight], lr=LR, polar_method="svd")
    with pytest.warns(UserWarning, match="momentum_dtype='int8'"):
        wide.load_state_dict(coded.state_dict())
    weight.grad = gradients[1].clone()
    wide.step()
    assert torch.equal(weight, through)
    broken = coded.state_dict()
    broken["state"][0]["exp_avg"] = broken["state"][0]["exp_avg"].float()
    with pytest.raises(ValueError, match="momentum_dtype='int8' keeps other state"):
        wide.load_state_dict(broken)
