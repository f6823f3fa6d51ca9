"""Triton's kernels in its interpreter: run by test_triton_products.py under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_muon import Muon
from hf_muon.polar import orthogonalize
from hf_muon.polar.kernels import choice, triton_products
from hf_muon.polar.kernels.triton_products import TRITON, Blocks
from tests.reference import polar as reference

CPU = torch.device("cpu")
HALF = [torch.bfloat16, torch.float16]
# Sums are in float32. In half precision a result is rounded once, which the interpreter does by
# cutting off: by a unit at most. In float32 a sum of up to 70 products is off by some 0.3 units,
# and −2A + A² doubles that in a difference.
UNITS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 8}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several tiles, and several depths, in matrices that the interpreter can afford."""
    monkeypatch.setattr(triton_products, "blocks_for", lambda *_: Blocks(16, 16, 32, 4, 2))


def agrees(found, exact):
    bound = UNITS[found.dtype] * torch.finfo(found.dtype).eps
    return bool((found.double() - exact).norm() <= bound * exact.norm())


def unwritten(*shape, like):
    return like.new_full(shape, torch.nan)


@pytest.mark.parametrize("shape", [(1, 5), (33, 70), (64, 64), (3, 40, 33)])
@pytest.mark.parametrize("dtype", UNITS)
def test_products_are_those_of_float64(shape, dtype):
    X = torch.randn(shape).to(dtype)
    square = (*shape[:-1], shape[-2])
    A = TRITON.gram(X, out=unwritten(*square, like=X))
    assert agrees(A, X.double() @ X.double().mT)
    assert not agrees(A, 1.02 * (X.double() @ X.double().mT))
    assert torch.equal(A, A.mT)

    A = A / shape[-1]
    P = TRITON.polynomial(A, -2.0, 1.5, out=unwritten(*square, like=X))
    assert agrees(P, -2.0 * A.double() + 1.5 * (A.double() @ A.double()))
    assert not agrees(P, -2.0 * A.double() + 1.6 * (A.double() @ A.double()))
    assert torch.equal(P, P.mT)

    Y = TRITON.general(P, X, X, beta=3.0, out=unwritten(*shape, like=X))
    assert agrees(Y, 3.0 * X.double() + P.double() @ X.double())
    Y = TRITON.general(P, X, out=unwritten(*shape, like=X))
    assert agrees(Y, P.double() @ X.double())


@pytest.mark.parametrize("tiles", range(1, 8))
def test_every_tile_of_a_triangle_is_computed_once(tiles):
    s = 16 * tiles - 3
    X = torch.randn(s, 20)
    A = TRITON.gram(X, out=unwritten(s, s, like=X))
    assert agrees(A, X.double() @ X.double().mT)
    assert torch.equal(A, A.mT)


def test_strides_are_any_and_nothing_else_is_written():
    A, B = torch.randn(70, 40).mT, torch.randn(3, 70, 120)[1, :, ::3]
    whole = torch.full((50, 60), 7.0)
    TRITON.general(A, B, out=whole[3:43, 5:45])
    assert agrees(whole[3:43, 5:45], A.double() @ B.double())
    TRITON.gram(A, out=whole[3:43, 5:45])
    assert agrees(whole[3:43, 5:45], A.double() @ A.double().mT)
    whole[3:43, 5:45] = 7.0
    assert (whole == 7.0).all()


@pytest.mark.parametrize("dtype", UNITS)
def test_norms_are_added_up_in_chunks(dtype, monkeypatch):
    monkeypatch.setattr(triton_products, "ROUNDS", 2)
    monkeypatch.setattr(triton_products, "BLOCK", 16)
    X = (100 * torch.randn(3, 40, 70)).to(dtype)  # 88 chunks, then 3, then one
    exact = X.double().norm(dim=(1, 2), keepdim=True)
    found = TRITON.norm(X)
    assert found.shape == (3, 1, 1)
    assert found.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert agrees(found, exact)
    assert not agrees(1.02 * found, exact)
    assert torch.equal(TRITON.norm(X[1].clone()), found[1, 0, 0])
    assert not TRITON.norm(torch.zeros(2, 5, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", UNITS)
def test_the_check_finds_nothing(dtype):
    assert choice.problem_of(TRITON, CPU, dtype) is None


@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 0.19), ("float32", 0.17)])
def test_a_polar_factor_is_as_close_as_by_torch(method, dtype, bound, monkeypatch):
    # The bounds: four tight steps on Gaussian matrices (docs/polar.md), and a tenth more.
    x = torch.randn(2, 33, 24)
    chosen = {"method": method, "coefficients": "tight", "steps": 4, "kernel": "triton"}
    monkeypatch.setattr(triton_products, "blocks_for", lambda *_: Blocks(32, 32, 32, 4, 2))
    monkeypatch.setattr("hf_muon.polar.factor.compute_dtype", lambda *_: getattr(torch, dtype))
    found = orthogonalize(x, **chosen, dtype=dtype)
    for one, of in zip(found, x, strict=True):
        oracle = reference.polar_factor(of.double())
        assert reference.relative_error(one.double(), oracle) <= bound
        assert reference.relative_error(-one.double(), oracle) > 1
        assert torch.equal(orthogonalize(of, **chosen, dtype=dtype), one)


def test_a_step_multiplies_by_triton(caplog):
    start, gradient = torch.randn(12, 20), torch.randn(12, 20)

    def stepped(**settings):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        Muon([("w", weight)], lr=0.1, polar_dtype="float32", **settings).step()
        return weight.detach()

    choice._checked.cache_clear()
    with caplog.at_level("INFO", logger="hf_muon"):
        found = stepped(polar_kernel="triton")
    assert "polar factors on cpu in float32 by triton" in caplog.text
    plain = stepped()
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)  # products in another order


class Operators(TorchDispatchMode):
    """The names of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_without_memory_each_product_is_one_operator_and_nothing_runs(monkeypatch):
    monkeypatch.setattr(triton_products, "product", None)  # a launch would raise
    with FakeTensorMode(), Operators() as seen:
        x = torch.empty(3, 20, 30)
        orthogonalize(
            x, method="newton_schulz", coefficients="quintic", steps=5, dtype="float32",
            kernel="triton",
        )  # fmt: skip
    assert seen.names.count("hf_muon::product") == 15
    assert seen.names.count("hf_muon::chunk_sums") == 1
    assert not {"aten::mm", "aten::bmm", "aten::baddbmm"} & set(seen.names)
