"""The iteration through ``torch.compile``: the same factor, from one graph."""

from __future__ import annotations

import pytest
import torch

from hf_muon.polar import factor, orthogonalize
from tests.reference import polar as reference

ITERATIVE = ("newton_schulz", "gram")
QUINTIC = {"coefficients": "quintic", "steps": 5, "dtype": "float32"}
TIGHT = {"coefficients": "tight", "steps": 4, "dtype": "float32"}


@pytest.mark.parametrize("compiled_method", ITERATIVE)
def test_compiled_iteration_agrees_with_the_plain_one(compiled_method, monkeypatch):
    # The eager backend traces and guards as the default one does, without a C++ compiler.
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, backend="eager", **kw))
    factor._iteration.cache_clear()
    for shape in [(8, 20), (8, 21), (3, 8, 20), (20, 8)]:
        x = torch.randn(shape)
        plain = orthogonalize(x, method=compiled_method, **QUINTIC)
        compiled = orthogonalize(x, method=compiled_method, **QUINTIC, compile=True)
        # Same products in the same order, up to fusing of the elementwise operations between.
        assert reference.relative_error(compiled, plain) < 1e-6
    factor._iteration.cache_clear()


@pytest.mark.parametrize("compiled_method", ITERATIVE)
def test_a_compiled_iteration_is_one_graph(compiled_method, monkeypatch):
    original = torch.compile
    whole = {"backend": "eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, **whole, **kw))
    factor._iteration.cache_clear()
    x = torch.randn(260, 300)  # large enough to be mirrored where it is not compiled
    chosen = {"method": compiled_method, **TIGHT}
    compiled = orthogonalize(x, **chosen, compile=True)
    # float32 rounds at 6e-8; XXᵀ squares the spread of the singular values, some hundreds.
    assert reference.relative_error(compiled, orthogonalize(x, **chosen)) < 1e-3
    factor._iteration.cache_clear()
