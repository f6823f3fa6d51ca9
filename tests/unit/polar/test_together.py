"""Which matrices are computed together, in a bucket and anywhere, and that it changes no bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hf_muon.distributed.buckets import plan_buckets
from hf_muon.distributed.exchange import exchange, reading
from hf_muon.distributed.find import find_layout
from hf_muon.distributed.layout import ALONE, Matrix
from hf_muon.polar import Workspace, apply_together, batched, batched_alike, orthogonalize
from hf_muon.polar.kernels.halves import strips_of
from hf_muon.polar.together import computed_together

CPU = torch.device("cpu")


def run(shapes, function, wire):
    """Every result, in the order of the shapes, with the inputs it was computed of."""
    layouts = [find_layout(torch.empty(s), [Matrix.whole(s)], "one", ALONE) for s in shapes]
    [bucket] = plan_buckets(layouts, [CPU] * len(shapes), 2**30)
    inputs = [torch.randn(shape).to(wire) for shape in shapes]
    steps = exchange(bucket, reading(bucket, lambda u, _: inputs[u.parameter]), function, wire)
    with pytest.raises(StopIteration) as end:
        next(steps)
    results = {unit.parameter: block.clone() for (unit, _), block in end.value.value.items()}
    return inputs, [results[index] for index in range(len(shapes))]


@pytest.mark.parametrize(
    ("wire", "shapes", "expected"),
    [
        (torch.float32, [(8, 64), (64, 8), (8, 64)], [(3, 8, 64)]),
        (torch.float32, [(8, 64)], [(2, 8, 64)]),
        (torch.float32, [(256, 300), (300, 256)], [(256, 300), (300, 256)]),
        (torch.bfloat16, [(256, 300), (300, 256)], [(2, 256, 300)]),
        (torch.bfloat16, [(256, 300)], [(256, 300)]),
        (torch.bfloat16, [(512, 512), (512, 512)], [(512, 512), (512, 512)]),
        (torch.bfloat16, [(384, 640), (384, 640)], [(384, 640), (384, 640)]),
        (torch.float32, [(1, 64), (64, 1)], [(2, 1, 64)]),
        (torch.float32, [(4, 5000)], [(2, 4, 5000)]),
    ],
)
def test_small_matrices_of_one_shape_are_computed_together(wire, shapes, expected):
    called = []
    inputs, results = run(shapes, lambda x: called.append(tuple(x.shape)) or x.mul_(2), wire)
    assert called == expected
    for x, y in zip(inputs, results, strict=True):
        assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coefficients", ["tight", "quintic"])
def test_together_each_gets_the_bits_that_it_gets_alone(wire, coefficients):
    shapes = [(130, 260), (260, 130), (40, 420), (130, 260), (40, 420), (90, 200)]
    settings = {"method": "auto", "coefficients": coefficients, "steps": 4, "dtype": wire}
    polar = partial(orthogonalize, **settings, workspace=Workspace())
    inputs, results = run(shapes, lambda x: polar(x, out=x), wire)
    for x, y in zip(inputs, results, strict=True):
        assert torch.equal(y, orthogonalize(x, **settings))
        assert not torch.equal(y, orthogonalize(x, **settings | {"steps": 5}))


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (4, 5120), (16, 3176), (24, 24), (384, 390)])
def test_what_else_a_rank_owns_changes_no_bit(shape, wire):
    settings = {"method": "auto", "coefficients": "polar_express", "steps": 5, "dtype": wire}
    polar = partial(orthogonalize, **settings, workspace=Workspace())
    for others in [0, 1, 3]:
        torch.manual_seed(0)
        _, [result, *_] = run([shape] * (1 + others), lambda x: polar(x, out=x), wire)
        torch.manual_seed(0)
        _, [alone] = run([shape], lambda x: polar(x, out=x), wire)
        assert torch.equal(result, alone)
    torch.manual_seed(1)
    assert not torch.equal(run([shape], lambda x: polar(x, out=x), wire)[1][0], alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_product_of_matrices_that_are_computed_together_is_mirrored(dtype):
    itemsize = torch.empty((), dtype=dtype).element_size()
    mirrored = 0
    for s in range(1, 513):
        for l in range(s, 1025, 31):  # noqa: E741
            if strips_of(torch.empty(s, l, dtype=dtype)) > 1:
                mirrored += 1
                assert not computed_together((s, l), itemsize, CPU)
                assert not computed_together((l, s), itemsize, CPU)
    assert mirrored > 0


def test_matrices_that_lie_across_come_back_as_they_were():
    x = torch.randn(5, 3, 4)
    batch = x.clone()
    seen = []
    shapes = [(3, 4)] * 2 + [(4, 3)] * 3
    apply_together(lambda whole: seen.append(whole.clone()), batch, shapes)
    assert torch.equal(batch, x)
    assert torch.equal(seen[0][:2], x[:2])
    assert torch.equal(seen[0][2:], x[2:].view(3, 4, 3).mT)
    assert not torch.equal(seen[0][2:], x[2:])


def test_batches_hold_the_indices_of_a_shape_and_then_of_its_transpose():
    shapes = [(4, 3), (2, 2), (3, 4), (4, 3), (3, 4)]
    assert batched(shapes) == [[2, 4, 0, 3], [1]]
    assert batched([]) == []


def test_alike_are_together_on_an_accelerator_and_one_by_one_on_a_cpu():
    keys = [(0.1, 3), (0.2, 3), (0.1, 3)]
    assert batched_alike(keys, torch.device("cuda")) == [[0, 2], [1]]
    assert batched_alike(keys, CPU) == [[0], [1], [2]]
