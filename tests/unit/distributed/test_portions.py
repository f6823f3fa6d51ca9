"""Elementwise work in portions."""

from __future__ import annotations

import torch

from hf_muon.distributed import portions as module
from hf_muon.distributed.portions import portions


def rows_of(*shapes):
    """Two tensors for each shape, the second one transposed in memory."""
    return [(torch.randn(shape), torch.randn(shape[::-1]).mT) for shape in shapes]


def test_large_matrices_are_cut_and_small_ones_joined(monkeypatch):
    monkeypatch.setattr(module, "portion_elements", lambda device: 24)
    rows = rows_of((2, 4), (4, 2), (7, 8), (1, 8), (1, 40), (2, 8))
    found = list(portions(("key", row) for row in rows))
    shapes = [[tuple(tensor.shape) for tensor in first] for _, (first, _) in found]
    # Rows of 8: three at a time. A row is never cut.
    assert shapes == [
        [(3, 8)], [(3, 8)], [(1, 8)], [(1, 40)], [(2, 4), (4, 2), (1, 8)], [(2, 8)],
    ]  # fmt: skip


def test_every_entry_comes_once_and_beside_its_own(monkeypatch):
    monkeypatch.setattr(module, "portion_elements", lambda device: 24)
    rows = rows_of((2, 4), (4, 2), (7, 8), (3, 8), (1, 40), (2, 8))
    expected = [2 * first + second for first, second in rows]
    for _, (firsts, seconds) in portions(("key", row) for row in rows):
        for first, second in zip(firsts, seconds, strict=True):
            first.mul_(2).add_(second)
    for (first, _), values in zip(rows, expected, strict=True):
        assert torch.equal(first, values)
        assert not torch.equal(2 * first, values)


def test_portions_have_one_key():
    rows = rows_of(*[(2, 3)] * 5)
    keyed = list(zip("aabba", rows, strict=True))
    found = [(key, len(first)) for key, (first, _) in portions(keyed)]
    assert found == [("a", 2), ("b", 2), ("a", 1)]
    assert list(portions([])) == []
