"""Which matrices of a bucket are computed together, and that it changes no bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hf_muon.distributed.buckets import plan_buckets
from hf_muon.distributed.exchange import apply_to_batch, exchange, reading
from hf_muon.distributed.layout import ALONE, Matrix
from hf_muon.distributed.replicated import replicated_layout
from hf_muon.polar import Workspace, orthogonalize

CPU = torch.device("cpu")


def run(shapes, function, wire):
    """Every result, in the order of the shapes, with the inputs it was computed of."""
    layouts = [replicated_layout(shape, [Matrix.whole(shape)], ALONE) for shape in shapes]
    [bucket] = plan_buckets(layouts, [CPU] * len(shapes), 2**30)
    inputs = [torch.randn(shape).to(wire) for shape in shapes]
    steps = exchange(bucket, reading(lambda unit, _: inputs[unit.parameter]), function, wire)
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
    shapes = [(130, 260), (260, 130), (24, 24), (130, 260), (24, 24), (40, 30)]
    settings = {"method": "auto", "coefficients": coefficients, "steps": 4, "dtype": wire}
    polar = partial(orthogonalize, **settings, workspace=Workspace())
    inputs, results = run(shapes, lambda x: polar(x, out=x), wire)
    for x, y in zip(inputs, results, strict=True):
        assert torch.equal(y, orthogonalize(x, **settings))
        assert not torch.equal(y, orthogonalize(x, **settings | {"steps": 5}))


def test_matrices_that_lie_across_come_back_as_they_were():
    x = torch.randn(5, 3, 4)
    batch = x.clone()

    class Lying:
        def __init__(self, shape):
            self.shape = shape

    units = [Lying((3, 4))] * 2 + [Lying((4, 3))] * 3
    seen = []
    apply_to_batch(lambda whole: seen.append(whole.clone()), batch, units)
    assert torch.equal(batch, x)
    assert torch.equal(seen[0][:2], x[:2])
    assert torch.equal(seen[0][2:], x[2:].view(3, 4, 3).mT)
    assert not torch.equal(seen[0][2:], x[2:])
