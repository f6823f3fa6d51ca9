"""The AdamW half on tensors of every layout: torch.optim.AdamW's numbers, and nothing outside."""

import copy

import pytest
import torch
from torch import nn

from hf_muon import Muon
from hf_muon.optimizer import adamw
from tests.unit.optimizer.test_checkpoint import through_a_file

SENTINEL = 7.0


def sliced():
    return torch.full((6, 5, 2), SENTINEL)[..., 0]


def strided_rows():
    return torch.full((12, 4), SENTINEL)[::2]


def transposed():
    return torch.full((5, 6), SENTINEL).t()


def channels_last():
    return torch.full((4, 3, 2, 2), SENTINEL).to(memory_format=torch.channels_last)


def contiguous():
    return torch.full((6, 5), SENTINEL)


LAYOUTS = [sliced, strided_rows, transposed, channels_last, contiguous]


def parameter_of(make):
    """A parameter of a layout and the memory that it is in."""
    view = make()
    whole = view._base if view._base is not None else view
    generator = torch.Generator().manual_seed(0)
    view.copy_(torch.randn(view.shape, generator=generator))
    return nn.Parameter(view), whole


def optimizer_of(p, **settings):
    matrix = {"params": [nn.Parameter(torch.eye(2))]}
    return Muon([matrix, {"params": [p], "algorithm": "adamw", **settings}], lr=0.1)


def run(optimizer, p, gradients):
    for gradient in gradients:
        p.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return p.detach().clone()


def gradients_of(p, layout, count=3):
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(p.shape, generator=generator) for _ in range(count)]
    return [g if layout == "contiguous" else torch.empty_like(p).copy_(g) for g in gradients]


@pytest.mark.parametrize("gradient", ["contiguous", "as the parameter"])
@pytest.mark.parametrize("make", LAYOUTS)
def test_every_layout_has_the_numbers_of_torch_and_nothing_else_is_written(make, gradient):
    (ours, memory), (theirs, expected) = parameter_of(make), parameter_of(make)
    gradients = gradients_of(ours, gradient)
    run(optimizer_of(ours), ours, gradients)
    run(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0), theirs, gradients)
    # The fused kernel rounds in another order than torch's default.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    written, untouched = memory == expected, memory == SENTINEL
    assert torch.equal(untouched, expected == SENTINEL)
    assert untouched.any() == (make in (sliced, strided_rows))
    if make in (sliced, strided_rows):  # torch's default is what runs
        assert written.all()


@pytest.mark.parametrize("make", LAYOUTS)
def test_a_wrong_pairing_would_be_seen(make):
    ours, _ = parameter_of(make)
    theirs, _ = parameter_of(make)
    gradients = gradients_of(ours, "contiguous")
    run(optimizer_of(ours), ours, gradients)
    shuffled = [g.flip(0) for g in gradients]
    run(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0), theirs, shuffled)
    assert (ours - theirs).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("make", "gradient", "fused"),
    [
        (contiguous, "contiguous", True),
        (channels_last, "as the parameter", True),
        (transposed, "as the parameter", True),
        (channels_last, "contiguous", False),
        (transposed, "contiguous", False),
        (sliced, "contiguous", False),
        (strided_rows, "as the parameter", False),
    ],
)
def test_the_fused_kernel_runs_exactly_where_it_is_right(monkeypatch, make, gradient, fused):
    seen = []
    kernel = adamw.adamw
    monkeypatch.setattr(
        adamw, "adamw", lambda *args, **kw: (seen.append(kw["fused"]), kernel(*args, **kw))
    )
    p, _ = parameter_of(make)
    run(optimizer_of(p), p, gradients_of(p, gradient, 1))
    run(optimizer_of(p, fused=False), p, gradients_of(p, gradient, 1))
    assert seen == [True if fused else None, None]


def test_dimensions_of_one_entry_have_any_stride(monkeypatch):
    seen = []
    monkeypatch.setattr(adamw, "adamw", lambda *args, **kw: seen.append(kw["fused"]))
    p = nn.Parameter(torch.zeros(1, 5))
    run(optimizer_of(p), p, [torch.ones(5).as_strided((1, 5), (77, 1))])
    assert seen == [True]


def test_one_group_may_hold_every_layout():
    ours, theirs = ([parameter_of(make)[0] for make in LAYOUTS] for _ in range(2))
    matrix = {"params": [nn.Parameter(torch.eye(2))]}
    optimizer = Muon([matrix, {"params": ours, "algorithm": "adamw"}], lr=0.1)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0)
    for _ in range(2):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.ones(a.shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def kernel_in(memory_format):
    return lambda kernel: kernel.to(memory_format=memory_format)


FORMATS = {
    "adamw": (kernel_in(torch.channels_last), kernel_in(torch.contiguous_format), (8, 3, 2, 2)),
    "muon": (lambda matrix: matrix.t().contiguous().t(), torch.Tensor.contiguous, (8, 12)),
}


@pytest.mark.parametrize("algorithm", FORMATS)
@pytest.mark.parametrize("turned", [False, True])
def test_a_checkpoint_is_resumed_in_another_memory_format(algorithm, turned):
    saved_in, loaded_in, shape = FORMATS[algorithm]
    if turned:
        saved_in, loaded_in = loaded_in, saved_in

    def build(laid_out):
        p = nn.Parameter(laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        if algorithm == "muon":
            return p, Muon([p], lr=0.1)
        return p, optimizer_of(p)

    source, optimizer = build(saved_in)
    run(optimizer, source, gradients_of(source, "as the parameter"))
    target, resumed = build(loaded_in)
    assert source.stride() != target.stride()
    with torch.no_grad():
        target.copy_(source)
    resumed.load_state_dict(through_a_file(copy.deepcopy(optimizer.state_dict())))
    assert torch.equal(resumed.state[target]["exp_avg"], optimizer.state[source]["exp_avg"])
    assert resumed.state[target]["exp_avg"].stride() == target.stride()
    more = gradients_of(target, "contiguous", 5)[3:]
    expected, got = run(optimizer, source, more), run(resumed, target, more)
    # Kernels and matrix products round by layout.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_groups_do_not_say_where_they_were_built():
    """``fused`` was decided by the device at construction, on which ranks may differ."""
    for device in ("cpu", "meta"):
        vector = nn.Parameter(torch.zeros(3, device=device))
        assert "fused" not in optimizer_of(vector).param_groups[1]
