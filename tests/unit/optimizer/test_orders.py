"""The step against the float64 oracle, for every order and every setting of the formula."""

import pytest
import torch

from hf_muon import Muon
from hf_muon.distributed import portions
from tests.reference.muon import muon as reference

ORDERS = ("pre_polar", "post_polar", "polar_only")
SHAPES = ((24, 40), (40, 24), (32, 32), (1, 16))
# float32 has 24 bits, 6e-8; the SVD's backward error and ten steps leave two digits of room.
FP32 = 1e-5


def small_start(*shape):
    """Weights about as large as their movement, so that its error is not their rounding."""
    return 0.05 * torch.randn(*shape)


def gradients_for(shape, steps=10):
    return [torch.randn(shape) for _ in range(steps)]


def train(weight, gradients, **settings):
    w = torch.nn.Parameter(weight.clone())
    optimizer = Muon([w], lr=0.02, polar_method="svd", **settings)
    for gradient in gradients:
        w.grad = gradient.to(w.dtype)
        optimizer.step()
    return w.detach()


def movement_error(trained, expected, start):
    """Error of the movement, relative to the movement: the start does not hide it."""
    return ((trained.double() - expected).norm() / (expected - start.double()).norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_step_equals_the_float64_oracle(order, nesterov, shape):
    start, gradients = small_start(*shape), gradients_for(shape)
    trained = train(start, gradients, order=order, nesterov=nesterov, weight_decay=0.1)
    expected = reference(
        start, gradients, order=order, nesterov=nesterov, lr=0.02, weight_decay=0.1
    )
    assert movement_error(trained, expected, start) < FP32


@pytest.mark.parametrize("order", ORDERS)
def test_the_oracle_tells_orders_apart(order):
    start, gradients = small_start(24, 40), gradients_for((24, 40))
    trained = train(start, gradients, order=order)
    for other in set(ORDERS) - {order}:
        expected = reference(start, gradients, order=other, lr=0.02)
        assert movement_error(trained, expected, start) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_without_momentum_the_orders_agree_bitwise(shape):
    start, gradients = small_start(*shape), gradients_for(shape)
    results = [train(start, gradients, order=order, momentum=0.0) for order in ORDERS]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_with_momentum_the_orders_differ():
    start, gradients = small_start(24, 40), gradients_for((24, 40))
    assert not torch.equal(*[train(start, gradients, order=order) for order in ORDERS[:2]])


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original", "spectral", "none"])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_step_size_rules(adjust_lr, shape):
    start, gradients = small_start(*shape), gradients_for(shape)
    trained = train(start, gradients, adjust_lr=adjust_lr)
    expected = reference(start, gradients, order="pre_polar", lr=0.02, adjust_lr=adjust_lr)
    assert movement_error(trained, expected, start) < FP32
    wrong_side = reference(
        start.T, [g.T for g in gradients], order="pre_polar", lr=0.02, adjust_lr=adjust_lr
    ).T
    if adjust_lr in ("original", "spectral"):
        assert movement_error(trained, wrong_side, start) > 0.1
    else:
        assert movement_error(trained, wrong_side, start) < FP32


@pytest.mark.parametrize("cautious", [True, False])
def test_weight_decay(cautious):
    start, gradients = small_start(24, 40), gradients_for((24, 40))
    settings = {"weight_decay": 0.5, "order": "pre_polar"}
    trained = train(start, gradients, cautious_weight_decay=cautious, **settings)
    expected = reference(start, gradients, lr=0.02, cautious=cautious, **settings)
    control = reference(start, gradients, lr=0.02, cautious=not cautious, **settings)
    assert movement_error(trained, expected, start) < FP32
    assert movement_error(trained, control, start) > 1e-3


def test_match_update_rms_restores_the_size_of_a_polar_factor():
    start, gradients = torch.zeros(24, 40), gradients_for((24, 40))
    settings = {"order": "post_polar", "match_update_rms": True}
    trained = train(start, gradients, **settings)
    expected = reference(start, gradients, lr=0.02, **settings)
    assert movement_error(trained, expected, start) < FP32
    control = reference(start, gradients, lr=0.02, order="post_polar")
    assert movement_error(trained, control, start) > 0.1


def test_match_update_rms_of_zero_is_zero():
    start = torch.randn(8, 12)
    trained = train(start, [torch.zeros(8, 12)], order="post_polar", match_update_rms=True)
    assert torch.equal(trained, start)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(order, dtype):
    start = torch.randn(24, 40).to(dtype)
    gradients = [g.to(dtype) for g in gradients_for((24, 40), steps=3)]
    trained = train(start, gradients, order=order, momentum_dtype="float32")
    expected = reference(start, gradients, order=order, lr=0.02)
    # Each of three writes rounds a weight of size one by at most half an ulp.
    assert trained.dtype == dtype
    ulp = torch.finfo(dtype).eps * start.abs().max().item() * 2
    assert (trained.double() - expected).abs().max() <= 3 * ulp
    assert not torch.equal(trained, start)


@pytest.mark.parametrize("settings", [{}, {"cautious_weight_decay": True}, {"nesterov": False}])
@pytest.mark.parametrize("order", ORDERS)
def test_what_goes_in_portions_is_what_goes_at_once(order, settings, monkeypatch):
    def trained(elements):
        monkeypatch.setattr(portions, "portion_elements", lambda device: elements)
        torch.manual_seed(0)
        weights = [
            torch.nn.Parameter(torch.randn(shape)) for shape in [(9, 14), (4, 6), (4, 6), (1, 40)]
        ]
        optimizer = Muon(weights, lr=0.1, order=order, weight_decay=0.1, **settings)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        return torch.cat([weight.detach().flatten() for weight in weights])

    assert torch.equal(trained(50), trained(2**17))


def test_the_size_of_an_update_is_matched_in_portions_too(monkeypatch):
    def update(elements):
        monkeypatch.setattr(portions, "portion_elements", lambda device: elements)
        weight, other = (
            torch.nn.Parameter(torch.zeros(9, 14)),
            torch.nn.Parameter(torch.zeros(14, 9)),
        )
        settings = {"order": "post_polar", "match_update_rms": True, "adjust_lr": "none"}
        optimizer = Muon([weight, other], lr=1.0, **settings)
        for seed in (0, 1):
            torch.manual_seed(seed)
            weight.grad, other.grad = torch.randn(9, 14), torch.randn(14, 9)
            before = weight.detach().clone()
            optimizer.step()
        return weight.detach() - before

    cut, whole = update(20), update(2**17)
    # Sums of squares in float64, in another order.
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-7)
    # RMS 1/√max(m, n), as of a polar factor; float32 sums.
    assert cut.square().mean().sqrt().item() == pytest.approx(14**-0.5, rel=1e-5)
