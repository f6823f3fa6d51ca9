"""A step is all or nothing: what is written is guarded, not only what comes in."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from hf_muon import Muon, rules
from hf_muon.polar import factor


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter((0.1 * torch.randn(shape)).to(dtype))


def everything(optimizer):
    """All that a step may write."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    state = [value for one in optimizer.state.values() for value in one.values()]
    return copy.deepcopy([*tensors, *state])


def refused(optimizer, error, match):
    """A step that raises and changes nothing that was there before."""
    before = everything(optimizer)
    with pytest.raises(error, match=match):
        optimizer.step()
    assert all(map(torch.equal, before, everything(optimizer)))


def two_halves(**settings):
    matrix, vector = parameter(6, 9), parameter(5)
    groups = [{"params": [("w", matrix)]}, {"params": [("b", vector)], "algorithm": "adamw"}]
    optimizer = Muon(groups, lr=0.01, **settings)
    matrix.grad, vector.grad = torch.randn(6, 9), torch.randn(5)
    optimizer.step()
    return optimizer, matrix, vector


@pytest.mark.parametrize("value", [1e38, -3e38])
def test_gradients_that_momentum_cannot_hold_are_refused(value):
    optimizer, matrix, _ = two_halves()
    matrix.grad = torch.full((6, 9), value)
    refused(optimizer, FloatingPointError, r"too large .* in w \(.*8\.5e\+37 is allowed\)")
    matrix.grad = torch.full((6, 9), value / 10)  # its square overflows, and it does not
    optimizer.step()
    assert torch.isfinite(matrix).all()


def test_gradients_whose_squares_adamw_cannot_hold_are_refused():
    optimizer, _, vector = two_halves()
    vector.grad = torch.full((5,), 2e19)
    refused(optimizer, FloatingPointError, "too large .* in b ")


def test_float16_momentum_has_its_own_range():
    optimizer, matrix, _ = two_halves(momentum_dtype="float16")
    matrix.grad = torch.full((6, 9), 1e5)
    refused(optimizer, FloatingPointError, "momentum_dtype='float32'")


def test_gradients_below_the_range_of_float16_momentum_are_said_once():
    optimizer, matrix, _ = two_halves(momentum_dtype="float16")
    matrix.grad = torch.full((6, 9), 1e-9)
    with pytest.warns(UserWarning, match=r"too small for momentum in float16.* in w") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with mock.patch("warnings.warn") as warned:
        optimizer.step()
    assert not warned.called


def test_the_same_is_said_of_weights_in_pure_float16():
    matrix = parameter(6, 9, dtype=torch.float16)
    with pytest.warns(UserWarning, match="Weights in pure float16"):
        optimizer = Muon([("w", matrix)], lr=0.01)
    matrix.grad = torch.full((6, 9), 2e-7, dtype=torch.float16)
    with pytest.warns(UserWarning, match=r"too small for momentum in float16.* in w"):
        optimizer.step()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_weights_in_low_precision_are_said(name):
    dtype = getattr(torch, name)
    with pytest.warns(UserWarning, match=f"Weights in pure {name} .* rounds away"):
        Muon([parameter(4, 6, dtype=dtype)], lr=0.01)
    with mock.patch("warnings.warn") as warned:
        Muon([parameter(4, 6, dtype=dtype)], lr=0.01, momentum_dtype=name)
        Muon([parameter(4, 6)], lr=0.01)
    assert not warned.called


def test_an_error_of_the_decomposition_leaves_everything_as_it_was():
    optimizer, *_ = two_halves(polar_method="svd")
    error = torch.linalg.LinAlgError("did not converge")
    with mock.patch.object(factor, "svd_polar", side_effect=error):
        refused(optimizer, torch.linalg.LinAlgError, "did not converge")
    before = everything(optimizer)
    optimizer.step()
    assert not any(map(torch.equal, before[:2], everything(optimizer)[:2]))


def test_the_wrong_dtype_for_a_cpu_names_the_setting_and_changes_nothing():
    matrix = parameter(6, 9)
    matrix.grad = torch.randn(6, 9)
    optimizer = Muon([matrix], lr=0.01, polar_dtype="float16")
    kept = matrix.detach().clone()
    with pytest.raises(ValueError, match=r"polar_dtype .* is float16 on a CPU"):
        optimizer.step()
    assert torch.equal(matrix, kept)


def test_every_bad_gradient_after_clipping_is_explained():
    optimizer, matrix, vector = two_halves()
    matrix.grad[0, 0] = float("nan")
    refused(optimizer, FloatingPointError, "NaN or infinity in w. No")
    torch.nn.utils.clip_grad_norm_([matrix, vector], 1.0)
    refused(optimizer, FloatingPointError, "in w, b.* clipping by a norm that is NaN")


def test_matrices_of_two_dtypes_are_decomposed_each_in_its_own():
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 12).double(), torch.randn(8, 12).double()
    results = []
    for others in ([], [parameter(8, 12)]):
        matrix = nn.Parameter(start.clone())
        optimizer = Muon([*others, matrix], lr=0.01, polar_method="svd")
        for one in (*others, matrix):
            one.grad = gradient.to(one.dtype)
        optimizer.step()
        results.append(matrix.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("order", ["pre_polar", "post_polar"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_matrix_without_gradient_moves_on_unless_it_is_skipped(order, skip):
    stack = parameter(3, 8, 12)
    settings = {"order": order, "weight_decay": 0.1, "skip_zero_gradients": skip}
    optimizer = Muon([stack], lr=0.01, **settings)
    gradient = torch.randn(3, 8, 12)
    stack.grad = gradient.clone()
    optimizer.step()
    before, kept = stack.detach().clone(), optimizer.state[stack]["exp_avg"].clone()
    stack.grad[1] = 0.0  # an expert without tokens
    optimizer.step()
    now = optimizer.state[stack]["exp_avg"]
    for expert in range(3):
        still = skip and expert == 1
        assert torch.equal(stack[expert], before[expert]) is still
        assert torch.equal(now[expert], kept[expert]) is still


def test_skipping_changes_nothing_where_no_gradient_is_zero():
    start, gradients = torch.randn(3, 8, 12), [torch.randn(3, 8, 12) for _ in range(3)]
    results = []
    for skip in (False, True):
        stack = nn.Parameter(start.clone())
        optimizer = Muon([stack], lr=0.01, skip_zero_gradients=skip)
        for gradient in gradients:
            stack.grad = gradient.clone()
            optimizer.step()
        results.append(stack.detach())
    assert torch.equal(*results)


def test_a_matrix_that_was_resized_is_named():
    matrix = parameter(6, 9)
    optimizer = Muon([("w", matrix)], lr=0.01)
    matrix.data = torch.zeros(8, 9)
    matrix.grad = torch.ones(8, 9)
    with pytest.raises(ValueError, match=r"w has shape \(8, 9\).* it was resized"):
        optimizer.step()
    assert not matrix.any()


def test_a_kernel_in_another_memory_format_is_named():
    kernel = parameter(4, 3, 2, 2)
    inside = (((0, (4, 12), (12, 1), 0),),)
    optimizer = Muon([{"params": [("conv", kernel)], "matrices": inside}], lr=0.01)
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    kernel.grad = torch.ones_like(kernel)
    before = kernel.detach().clone()
    with pytest.raises(ValueError, match=r"its matrix, .*channels_last.* make it contiguous"):
        optimizer.step()
    assert torch.equal(kernel, before)


def fails(*_, **__):
    raise RuntimeError("no result")


def test_groups_whose_maps_cannot_fail_are_taken_back_too():
    iterated, decomposed = parameter(6, 9), parameter(6, 9)
    groups = [{"params": [iterated]}, {"params": [decomposed], "polar_method": "svd"}]
    optimizer = Muon(groups, lr=0.01)
    for one in (iterated, decomposed):
        one.grad = torch.randn(6, 9)
    optimizer.step()
    with mock.patch.object(factor, "svd_polar", fails):
        refused(optimizer, RuntimeError, "no result")


def pairs_optimizer(b, **settings):
    a = nn.Parameter(torch.randn(2, 9))
    structure = {
        "params": [("A", a), ("B", b)], "pairs": ("B", "A"), "factors": ("A", "B"),
        "scalings": (1.0, 1.0),
    }  # fmt: skip
    optimizer = Muon([structure], lr=0.01, **settings)
    a.grad, b.grad = torch.randn(2, 9), torch.randn(6, 2)
    return optimizer, a


@pytest.mark.parametrize("update", ["product", "tangent"])
def test_pairs_whose_decomposition_fails_are_taken_back(update):
    optimizer, _ = pairs_optimizer(parameter(6, 2), lora_update=update, polar_method="svd")
    optimizer.step()
    with mock.patch.object(factor, "svd_polar", fails):
        refused(optimizer, RuntimeError, "no result")


@pytest.mark.parametrize("update", ["factor", "product", "tangent"])
def test_a_fresh_adapter_trains_where_zero_gradients_are_skipped(update):
    b = nn.Parameter(torch.zeros(6, 2))
    settings = {"lora_update": update, "skip_zero_gradients": True}
    optimizer, a = pairs_optimizer(b, **settings)
    a.grad = torch.zeros_like(a)  # as B is zero
    start = a.detach().clone()
    optimizer.step()
    assert b.any()
    assert torch.equal(a, start)
    a.grad = torch.randn_like(a)
    optimizer.step()
    assert not torch.equal(a, start)


@pytest.mark.parametrize("kind", ["filter", "rescale"])
def test_a_strangers_stage_that_fails_is_taken_back(kind):
    register = {"filter": rules.register_filter, "rescale": rules.register_rescale}[kind]
    calls = []

    def sometimes(x, buffers, given):
        calls.append(1)
        for average in buffers[0] if buffers else ():
            average.add_(1)
        return fails() if len(calls) > 3 else [one.clone() for one in x]

    register("sometimes", sometimes)
    optimizer, *_ = two_halves(**{kind: "sometimes"})
    calls += [1] * 3
    refused(optimizer, RuntimeError, "no result")
    for table in (rules.FILTERS, rules.RESCALES):
        table.pop("sometimes", None)


def test_gradients_that_the_compute_dtype_cannot_hold_are_refused():
    matrix = nn.Parameter(torch.randn(6, 9).double())
    optimizer = Muon([("w", matrix)], lr=0.01)
    matrix.grad = torch.randn(6, 9).double()
    optimizer.step()
    matrix.grad = torch.full((6, 9), 1e200, dtype=torch.float64)
    refused(optimizer, FloatingPointError, "too large .* in w")
    exact = Muon([("w", matrix)], lr=0.01, polar_dtype="float64")
    exact.step()
    assert torch.isfinite(matrix).all()


def test_each_dtype_of_a_group_has_its_own_limit():
    matrix, wide, narrow = parameter(6, 9), parameter(5), parameter(5, dtype=torch.float16)
    rest = {"params": [("wide", wide), ("narrow", narrow)], "algorithm": "adamw"}
    optimizer = Muon([{"params": [("w", matrix)]}, rest], lr=0.01)
    matrix.grad, wide.grad = torch.randn(6, 9), torch.full((5,), 6e3)
    narrow.grad = torch.full((5,), 6e3, dtype=torch.float16)
    optimizer.state.clear()
    with pytest.raises(FloatingPointError, match=r"too large .* in narrow"):
        optimizer.step()


def test_a_map_that_gives_no_matrix_of_its_size_is_taken_back():
    rules.register_map("first_row", lambda X, polar, settings: polar(X)[: 1 + 5 * (len(X) < 7)])
    matrix = parameter(8, 9)
    matrix.grad = torch.randn(8, 9)
    optimizer = Muon([matrix], lr=0.01, matrix_map="first_row")
    kept = matrix.detach().clone()
    with pytest.raises(ValueError, match=r"of shape \(8, 9\) one of shape \(1, 9\)"):
        optimizer.step()
    assert torch.equal(matrix, kept)
    del rules.MAPS["first_row"]


def test_an_error_that_nobody_expected_is_raised_all_the_same():
    optimizer, _ = pairs_optimizer(parameter(6, 2), lora_update="product")
    optimizer.step()
    with (
        mock.patch("hf_muon.optimizer.pair_maps.product_update", fails),
        pytest.raises(RuntimeError, match="no result"),
    ):
        optimizer.step()
