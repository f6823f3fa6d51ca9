"""On accelerators: sides that products are fast for, and every matrix of a batch lying one way.

With real numbers on a CPU that is worked as an accelerator is.
"""

import pytest
import torch

from hf_muon.polar import apply_together, batched, devices, orthogonalize
from hf_muon.polar.together import aligned

CPU = torch.device("cpu")
EXACT = {"coefficients": "polar_express", "steps": 5, "dtype": "float64"}
# Odd sides below and above 64, squares, tall and wide ones, and those that need no zeros.
SHAPES = [(9, 5), (5, 9), (72, 67), (67, 72), (67, 67), (1, 70), (16, 24), (24, 16), (3, 3)]


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(devices, "is_cpu", lambda device: False)


def test_sides_begin_where_tiles_do(accelerator):
    sides = {5461: 5504, 5464: 5504, 5472: 5472, 4: 8, 8: 8, 63: 64, 65: 128, 11008: 11008}
    assert {side: aligned(side, CPU) for side in sides} == sides


def test_a_cpu_needs_no_zeros():
    assert aligned(5461, CPU) == 5461


@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_around_a_matrix_change_nothing(shape, method, monkeypatch):
    x = torch.randn(2, *shape, dtype=torch.float64)
    expected = orthogonalize(x, method=method, **EXACT)
    monkeypatch.setattr(devices, "is_cpu", lambda device: False)
    found = orthogonalize(x, method=method, **EXACT)
    fewer = orthogonalize(x, method=method, **{**EXACT, "steps": 4})
    # Sums of at most 72 products in another order, over some 15 products.
    assert (found - expected).abs().max() < 1e-12
    assert (found - fewer).abs().max() > 1e-9
    assert orthogonalize(x, method=method, **EXACT, out=x) is x
    assert torch.equal(x, found)


@pytest.mark.parametrize("shapes", [[(5, 9), (9, 5), (9, 5)], [(9, 5)] * 2, [(16, 24), (24, 16)]])
def test_matrices_and_their_transposes_lie_one_way(shapes, accelerator):
    [order] = batched(shapes)
    shapes = [shapes[index] for index in order]
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    batch = torch.stack([matrix.view(shapes[0]) for matrix in matrices])
    seen = []

    def double(x):
        seen.append(x.clone())
        x.mul_(2)

    apply_together(double, batch, shapes)
    [given] = seen
    s, l = sorted(shapes[0])  # noqa: E741
    assert given.shape == (len(shapes), aligned(s, CPU), aligned(l, CPU))
    for own, lying, result in zip(matrices, given, batch, strict=True):
        wide = own if own.shape[0] <= own.shape[1] else own.mT
        assert torch.equal(lying[:s, :l], wide)
        assert lying.count_nonzero() == own.count_nonzero()  # zeros beside it
        assert torch.equal(result.view(own.shape), 2 * own)


def test_what_lies_right_already_is_computed_in_place(accelerator):
    batch = torch.randn(3, 16, 24)
    seen = []
    apply_together(lambda x: seen.append(x.data_ptr()), batch, [(16, 24)] * 3)
    assert seen == [batch.data_ptr()]
