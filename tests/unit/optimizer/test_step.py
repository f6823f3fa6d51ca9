"""What a step reads, writes and refuses, beyond its formula."""

import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_muon import Muon
from hf_muon.optimizer import agreement
from tests.reference.muon import muon as reference


def optimizer_of(*weights, **settings):
    return Muon(list(weights), **{"lr": 0.02, "polar_method": "svd", **settings})


def parameter(*shape, grad=True):
    weight = nn.Parameter(torch.randn(*shape))
    if grad:
        weight.grad = torch.randn(*shape)
    return weight


def test_gradients_are_not_written():
    weight = parameter(8, 12)
    kept = weight.grad.clone()
    optimizer_of(weight).step()
    assert torch.equal(weight.grad, kept)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors, for which an accelerator is waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_reads_one_flag(dtype):
    weight, vector = parameter(8, 12), nn.Parameter(torch.zeros(3))
    vector.grad = torch.ones(3)
    groups = [{"params": [weight]}, {"params": [vector], "algorithm": "adamw", "fused": False}]
    optimizer = Muon(groups, lr=0.02, momentum_dtype=dtype)
    optimizer.step()
    with Reads() as reads, mock.patch.object(agreement, "_read", wraps=agreement._read) as read:
        optimizer.step()
    assert read.call_count == 1
    # One flag is read as a number; two, where momentum is in float16, in one list.
    counts = 1 + len(optimizer.param_groups[1]["params"])  # and AdamW's own, which is on the CPU
    assert reads.count == counts - (dtype == "float16")
    with Reads() as reads:
        float(weight.sum())
    assert reads.count == 1


def test_state_exists_for_every_parameter_after_the_first_step():
    with_gradient, without = parameter(8, 12), parameter(6, 4, grad=False)
    vector = nn.Parameter(torch.zeros(3))
    optimizer = Muon(
        [{"params": [with_gradient, without]}, {"params": [vector], "algorithm": "adamw"}], lr=0.1
    )
    assert not optimizer.state
    kept = without.detach().clone()
    optimizer.step()
    assert set(optimizer.state[with_gradient]) == {"step", "exp_avg"}
    assert set(optimizer.state[without]) == {"step", "exp_avg"}
    assert set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}
    assert [int(optimizer.state[p]["step"]) for p in (with_gradient, without)] == [1, 0]
    assert torch.equal(without, kept)


def test_polar_only_keeps_no_buffer():
    weight = parameter(8, 12)
    optimizer = optimizer_of(weight, order="polar_only")
    optimizer.step()
    assert set(optimizer.state[weight]) == {"step"}


def test_bytes_of_state_per_parameter():
    weight = parameter(64, 96)
    optimizer = optimizer_of(weight)
    optimizer.step()
    size = sum(t.numel() * t.element_size() for t in optimizer.state[weight].values())
    assert size / weight.numel() <= 4.01


@pytest.mark.parametrize("method", ["svd", "newton_schulz", "gram"])
@pytest.mark.parametrize("order", ["pre_polar", "post_polar", "polar_only"])
def test_zero_gradients_with_lr_zero_change_nothing(order, method):
    # What torch.distributed.checkpoint does to make the state of an optimizer before loading.
    weight = parameter(8, 12)
    weight.grad.zero_()
    kept = weight.detach().clone()
    optimizer = optimizer_of(weight, order=order, polar_method=method, lr=0.0, weight_decay=0.1)
    optimizer.step(closure=None)
    assert torch.equal(weight, kept)
    assert optimizer.state[weight]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["muon", "adamw"])
def test_non_finite_gradients_change_nothing(bad, where):
    matrix, vector = parameter(8, 12), parameter(5)
    named = [("layer.weight", matrix)], [("layer.bias", vector)]
    optimizer = Muon(
        [{"params": named[0]}, {"params": named[1], "algorithm": "adamw"}], lr=0.1, weight_decay=0.1
    )
    optimizer.step()
    kept = [t.clone() for p in (matrix, vector) for t in (p.detach(), *optimizer.state[p].values())]
    poisoned = matrix if where == "muon" else vector
    poisoned.grad.view(-1)[3] = bad
    with pytest.raises(FloatingPointError, match="layer.weight" if where == "muon" else "bias"):
        optimizer.step()
    now = [t for p in (matrix, vector) for t in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    poisoned.grad.view(-1)[3] = 0.0
    optimizer.step()
    assert not torch.equal(kept[0], matrix)


def test_a_gradient_scaler_skips_the_step():
    weight = parameter(8, 12)
    optimizer = optimizer_of(weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.step()
    kept, average = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    for bad, moves in ((math.inf, False), (1.0, True)):
        weight.grad = scaler.scale(torch.randn(8, 12))
        weight.grad[0, 0] = bad
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, kept) is not moves
        assert torch.equal(optimizer.state[weight]["exp_avg"], average) is not moves
    assert scaler.get_scale() == 2.0


def test_finite_gradients_whose_squares_overflow_are_accepted():
    weight = parameter(8, 12)
    weight.grad = torch.full((8, 12), 3e38)
    optimizer_of(weight, order="polar_only").step()
    assert torch.isfinite(weight).all()


def test_stacks_are_trained_matrix_by_matrix():
    start, gradient = 0.05 * torch.randn(3, 8, 12), torch.randn(3, 8, 12)
    gradient[1] = 0.0  # an idle expert
    stack = nn.Parameter(start.clone())
    stack.grad = gradient
    optimizer_of(stack).step()
    for trained, w, g in zip(stack.detach(), start, gradient, strict=True):
        expected = reference(w, [g], order="pre_polar", lr=0.02)
        assert torch.allclose(trained.double(), expected, rtol=0, atol=1e-6)  # float32 rounding
    assert torch.equal(stack[1], start[1])


def test_matrices_inside_a_parameter_have_their_own_step_sizes():
    start, gradient = 0.05 * torch.randn(20, 6), torch.randn(20, 6)
    fused = nn.Parameter(start.clone())
    fused.grad = gradient
    rows = ((0, (14, 6), (6, 1), 0), (14 * 6, (6, 6), (6, 1), 0))
    Muon([{"params": [fused], "matrices": (rows,)}], lr=0.02, polar_method="svd").step()
    for part in (slice(0, 14), slice(14, 20)):
        expected = reference(start[part], [gradient[part]], order="pre_polar", lr=0.02)
        assert torch.allclose(fused[part].double(), expected, rtol=0, atol=1e-6)
    whole = reference(start, [gradient], order="pre_polar", lr=0.02)
    assert not torch.allclose(fused.double(), whole, atol=1e-3)


def test_interleaved_columns():
    start, gradient = 0.05 * torch.randn(6, 8), torch.randn(6, 8)
    fused = nn.Parameter(start.clone())
    fused.grad = gradient
    columns = tuple((i, (6, 4), (8, 2), 1) for i in (0, 1))
    Muon([{"params": [fused], "matrices": (columns,)}], lr=0.02, polar_method="svd").step()
    for i in (0, 1):
        expected = reference(start[:, i::2], [gradient[:, i::2]], order="pre_polar", lr=0.02)
        assert torch.allclose(fused[:, i::2].double(), expected, rtol=0, atol=1e-6)


def test_fan_out_dim_turns_the_step_size():
    start, gradient = torch.zeros(4, 16), torch.randn(4, 16)
    weights = []
    for fan_out_dim in (0, 1):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient
        whole = ((0, (4, 16), (16, 1), fan_out_dim),)
        Muon(
            [{"params": [weight], "matrices": (whole,)}],
            lr=0.02,
            adjust_lr="spectral",
            polar_method="svd",
        ).step()
        weights.append(weight.detach())
    # √(m/n): 1/2 with four outputs, 2 with sixteen.
    assert torch.allclose(weights[1], 4 * weights[0])


def test_unknown_orientation_is_refused_where_it_matters():
    stack = parameter(3, 8, 12)
    with pytest.raises(ValueError, match=r"adjust_lr='original'.*8 by 12.*fan_out"):
        optimizer_of(stack, adjust_lr="original").step()
    optimizer_of(parameter(3, 8, 8), adjust_lr="original").step()


def test_momentum_warmup_is_linear_and_survives_a_reload():
    weight, gradients = parameter(8, 12), [torch.randn(8, 12) for _ in range(6)]
    settings = {"momentum_start": 0.5, "momentum_warmup_steps": 4, "momentum": 0.9}
    optimizer = optimizer_of(weight, **settings)
    average = torch.zeros(8, 12)
    betas = [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    for index, (gradient, beta) in enumerate(zip(gradients, betas, strict=True)):
        if index == 3:
            reloaded = optimizer_of(weight, **settings)
            reloaded.load_state_dict(optimizer.state_dict())
            optimizer = reloaded
        weight.grad = gradient
        optimizer.step()
        average = beta * average + (1 - beta) * gradient
        assert torch.allclose(optimizer.state[weight]["exp_avg"], average, atol=1e-6)


def test_momentum_is_read_from_the_group():
    weight = parameter(8, 12)
    optimizer = optimizer_of(weight)
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["exp_avg"], weight.grad)


def test_closure_is_called_with_gradients_enabled():
    weight = parameter(4, 6, grad=False)
    optimizer = optimizer_of(weight)

    losses = []

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    expected = weight.square().sum().item()
    assert optimizer.step(closure) == expected
    assert losses == [expected]
    assert weight.square().sum().item() < expected


def test_batches_of_small_matrices_equal_a_loop():
    shapes = [(4, 32), (4, 32), (32, 4), (8, 8), (4, 32), (200, 100)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    together = [nn.Parameter(w.clone()) for w in start]
    for weight, gradient in zip(together, gradients, strict=True):
        weight.grad = gradient
    Muon(together, lr=0.02, polar_method="newton_schulz").step()
    for weight, w, gradient in zip(together, start, gradients, strict=True):
        alone = nn.Parameter(w.clone())
        alone.grad = gradient
        Muon([alone], lr=0.02, polar_method="newton_schulz").step()
        # Batched and plain products may round differently: five float32 steps.
        assert torch.allclose(weight, alone, rtol=0, atol=1e-6)


def test_non_contiguous_weights_and_gradients():
    start, gradient = 0.05 * torch.randn(12, 8), torch.randn(12, 8)
    weight = nn.Parameter(start.T.contiguous().T)
    weight.grad = gradient.T.contiguous().T
    assert not weight.is_contiguous()
    optimizer_of(weight).step()
    expected = reference(start, [gradient], order="pre_polar", lr=0.02)
    assert torch.allclose(weight.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"order": "post_polar", "match_update_rms": True}])
def test_the_memory_format_of_a_matrix_does_not_matter(settings):
    start, gradient = torch.randn(12, 8), torch.randn(12, 8)
    rows, columns = nn.Parameter(start.clone()), nn.Parameter(start.T.contiguous().T)
    for weight in (rows, columns):
        weight.grad = gradient.clone()
        optimizer_of(weight, **settings).step()
    assert torch.equal(rows, columns)


def test_several_matrices_in_a_tensor_that_is_not_contiguous_are_refused():
    weight = nn.Parameter(torch.randn(6, 20).T)
    weight.grad = torch.randn(20, 6)
    rows = ((0, (14, 6), (6, 1), 0), (14 * 6, (6, 6), (6, 1), 0))
    kept = weight.detach().clone()
    with pytest.raises(ValueError, match="not contiguous in memory"):
        Muon([{"params": [weight], "matrices": (rows,)}], lr=0.02).step()
    assert torch.equal(weight, kept)


def test_an_order_that_the_state_was_not_made_for_fails_before_the_weight_changes():
    weight = parameter(4, 6)
    optimizer = optimizer_of(weight, order="polar_only")
    optimizer.step()
    kept = weight.detach().clone()
    optimizer.param_groups[0]["order"] = "pre_polar"
    with pytest.raises(ValueError, match=r"parameter 0 .* holds only \['step'\]"):
        optimizer.step()
    assert torch.equal(weight, kept)


# --- groups -------------------------------------------------------------------------------------


def test_groups_hold_plain_values_and_muon_comes_first():
    vector, matrix = parameter(5), parameter(4, 6)
    optimizer = Muon(
        [
            {"params": [("b", vector)], "algorithm": "adamw"},
            {"params": []},
            {"params": [("w", matrix)], "lr": 0.5},
        ],
        lr=0.1,
    )
    assert [group["algorithm"] for group in optimizer.param_groups] == ["muon", "adamw"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.param_groups[0]["param_names"] == ["w"]
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key not in ("params", "param_names"):
                assert isinstance(value, str | int | float | bool | tuple), key


def test_no_attribute_that_the_trainer_would_call():
    assert not hasattr(Muon, "train")
    assert not hasattr(Muon, "eval")
