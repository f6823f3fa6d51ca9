"""Elementwise work in portions."""

from __future__ import annotations

import pytest
import torch

from hf_muon.distributed import portions as module
from hf_muon.distributed.portions import portions

CPU = torch.device("cpu")


@pytest.fixture
def of_24(monkeypatch):
    monkeypatch.setattr(module, "portion_elements", lambda device: 24)


@pytest.mark.usefixtures("of_24")
def test_large_matrices_are_cut_and_small_ones_joined():
    tensors = [torch.randn(shape) for shape in [(2, 4), (4, 2), (7, 8), (1, 8), (1, 40), (2, 8)]]
    sizes = [tuple(one.shape) for one in tensors]
    found = portions([0] * 6, sizes, CPU)
    shapes = [[tuple(part.shape) for part in portion.of(tensors)] for portion in found]
    # Rows of 8: three at a time. A row is never cut.
    assert shapes == [
        [(3, 8)], [(3, 8)], [(1, 8)], [(1, 40)], [(2, 4), (4, 2), (1, 8)], [(2, 8)],
    ]  # fmt: skip
    whole = portions([0] * 6, sizes, CPU, cut=False)
    assert sorted(place for portion in whole for place in portion.places) == list(range(6))
    assert all(portion.rows is None for portion in whole)


@pytest.mark.usefixtures("of_24")
def test_every_entry_comes_once_and_beside_its_own():
    shapes = [(2, 4), (4, 2), (7, 8), (3, 8), (1, 40), (2, 8)]
    firsts = [torch.randn(shape) for shape in shapes]
    seconds = [torch.randn(shape[::-1]).mT for shape in shapes]
    expected = [2 * first + second for first, second in zip(firsts, seconds, strict=True)]
    for portion in portions([0] * 6, shapes, CPU):
        for first, second in zip(portion.of(firsts), portion.of(seconds), strict=True):
            first.mul_(2).add_(second)
    for first, values in zip(firsts, expected, strict=True):
        assert torch.equal(first, values)
        assert not torch.equal(2 * first, values)


def test_portions_have_one_key():
    found = portions(list("aabba"), [(2, 3)] * 5, CPU)
    assert [(portion.key, portion.places) for portion in found] == [("a", (0, 1, 4)), ("b", (2, 3))]
    assert found[0].each("vwxyz") == ["v", "w", "z"]
    assert portions([], [], CPU) == []
