"""The iteration through ``torch.compile``: the same factor, from one graph."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from hf_muon.polar import factor, orthogonalize, polar_factor
from tests.reference import polar as reference

ITERATIVE = ("newton_schulz", "gram")
QUINTIC = {"coefficients": "quintic", "steps": 5, "dtype": "float32"}
TIGHT = {"coefficients": "tight", "steps": 4, "dtype": "float32"}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    forget()
    yield
    forget()


def forget():
    factor._iteration.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled_method", ITERATIVE)
def test_compiled_iteration_agrees_with_the_plain_one(compiled_method, monkeypatch):
    # The eager backend traces and guards as the default one does, without a C++ compiler.
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, backend="eager", **kw))
    for shape in [(8, 20), (8, 21), (3, 8, 20), (20, 8)]:
        x = torch.randn(shape)
        plain = orthogonalize(x, method=compiled_method, **QUINTIC)
        compiled = orthogonalize(x, method=compiled_method, **QUINTIC, compile=True)
        # Same products in the same order, up to fusing of the elementwise operations between.
        assert reference.relative_error(compiled, plain) < 1e-6


@pytest.mark.parametrize("compiled_method", ITERATIVE)
def test_a_compiled_iteration_is_one_graph(compiled_method, monkeypatch):
    original = torch.compile
    whole = {"backend": "eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, **whole, **kw))
    x = torch.randn(260, 300)  # large enough to be mirrored where it is not compiled
    chosen = {"method": compiled_method, **TIGHT}
    compiled = orthogonalize(x, **chosen, compile=True)
    # float32 rounds at 6e-8; XXᵀ squares the spread of the singular values, some hundreds.
    assert reference.relative_error(compiled, orthogonalize(x, **chosen)) < 1e-3


@pytest.mark.parametrize("compiled_method", ITERATIVE)
def test_a_compiled_iteration_returns_the_factor_alone(compiled_method, monkeypatch):
    """What is written to arguments would be further results, each copied back."""
    results = []

    def counting(graph, _):
        [output] = graph.graph.find_nodes(op="output")
        results.append(len(output.args[0]))
        return make_boxed_func(graph.forward)

    original = torch.compile
    backend = aot_autograd(fw_compiler=counting, inference_compiler=counting)
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, backend=backend, **kw))
    x = torch.randn(20, 30)
    chosen = {"method": compiled_method, **TIGHT}
    compiled = orthogonalize(x, **chosen, compile=True)
    assert results == [1]
    assert reference.relative_error(compiled, orthogonalize(x, **chosen)) < 1e-5


def test_a_function_that_calls_it_can_be_compiled_whole():
    x = torch.randn(20, 30)
    compiled = torch.compile(polar_factor, backend="eager", fullgraph=True)
    chosen = {"coefficients": "tight", "steps": 4, "dtype": "float32"}
    assert torch.equal(compiled(x, **chosen), polar_factor(x, **chosen))
