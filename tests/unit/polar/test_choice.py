"""Who multiplies: what is chosen where, and the check that comes before."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

from hf_muon import Muon, MuonConfig
from hf_muon.polar import orthogonalize, polar_factor
from hf_muon.polar.kernels import HALVES, TORCH, choice, products_for
from hf_muon.polar.kernels.products import multiply, norm

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF, SINGLE = torch.bfloat16, torch.float32


def one_by_one(A, B, C=None, *, beta=0.0, alpha=1.0, out):
    """A product whose bits no batch changes, exactly symmetric for symmetric factors."""
    found = alpha * (A.double() @ B.double()) + (0 if C is None else beta * C.double())
    return out.copy_(found)


def norms(X):
    return X.double().norm(dim=(-2, -1), keepdim=X.ndim > 2).to(X.dtype)


GOOD = dataclasses.replace(
    TORCH, name="good", general=one_by_one, symmetric=one_by_one, norm=norms, is_fixed=True
)


@pytest.fixture(autouse=True)
def _nothing_checked_before():
    choice._checked.cache_clear()
    yield
    choice._checked.cache_clear()


@pytest.fixture
def found(monkeypatch):
    """A device of a new kind in place of a CUDA device, and products that are found for it."""

    def use(products):
        monkeypatch.setattr(choice, "_missing", lambda name: None)
        monkeypatch.setattr(choice, "_unfit", lambda name, device: None)
        monkeypatch.setattr(choice, "_loaded", lambda name: products)
        check = choice.problem_of
        monkeypatch.setattr(choice, "problem_of", lambda of, _, dtype: check(of, CPU, dtype))

    return use


def test_a_cpu_multiplies_with_torch():
    for kernel in ("auto", "torch"):
        assert products_for(kernel, CPU, HALF, by_halves=True) is HALVES
        assert products_for(kernel, CPU, HALF, by_halves=False) is TORCH
    for device in ("meta", "xpu", "mps"):
        assert products_for("auto", torch.device(device), HALF, by_halves=False) is TORCH


def test_auto_is_triton_in_half_precision_on_cuda(found, caplog):
    found(GOOD)
    with caplog.at_level("INFO", logger="hf_muon"):
        assert products_for("auto", CUDA, HALF, by_halves=True) is GOOD
        assert products_for("auto", CUDA, HALF, by_halves=True) is GOOD
    assert [r.message for r in caplog.records] == ["polar factors on cuda:0 in bfloat16 by triton"]
    assert products_for("auto", CUDA, SINGLE, by_halves=True) is HALVES
    assert products_for("triton", CUDA, SINGLE, by_halves=True) is GOOD
    assert products_for("triton", CUDA, torch.float64, by_halves=True) is HALVES
    assert products_for("quack", CUDA, SINGLE, by_halves=True) is HALVES


def wrong_symmetric(A, B, C=None, *, beta=0.0, alpha=1.0, out):
    return one_by_one(A, B, C, beta=beta, alpha=1.05 * alpha, out=out)


def skew(A, B, C=None, *, beta=0.0, alpha=1.0, out):
    one_by_one(A, B, C, beta=beta, alpha=alpha, out=out)
    out[..., 0, -1] *= 1 + 2 * torch.finfo(out.dtype).eps
    return out


def of_batches(X):
    return norms(X) * (1 + (X.ndim - 2) * torch.finfo(X.dtype).eps)


def nothing(A, B, C=None, *, beta=0.0, alpha=1.0, out):
    return out.fill_(torch.nan)


def broken(*_, **__):
    raise OSError("no compiler")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"symmetric": wrong_symmetric}, r"XXᵀ of 33 × 70 is off by 0\.05\d*, 0\.0078 is allowed"),
        ({"general": nothing}, r"aX \+ BX of 33 × 70 is off by nan"),
        ({"symmetric": skew}, "symmetric products of 33 × 70 are not exactly symmetric"),
        ({"norm": of_batches}, "a matrix of 33 × 70 has other bits alone than in a batch"),
        ({"general": broken}, "OSError: no compiler"),
    ],
)
def test_what_multiplies_wrongly_is_not_used(change, said, found):
    assert choice.problem_of(GOOD, CPU, HALF) is None
    found(dataclasses.replace(GOOD, **change))
    with pytest.warns(UserWarning, match=said):
        assert products_for("auto", CUDA, HALF, by_halves=True) is HALVES
    assert products_for("auto", CUDA, HALF, by_halves=True) is HALVES  # said once
    with pytest.raises(RuntimeError, match=f"is 'triton', which cannot be used: {said}"):
        products_for("triton", CUDA, HALF, by_halves=True)


def test_the_check_draws_no_random_numbers_of_others():
    before = torch.get_rng_state()
    assert choice.problem_of(GOOD, CPU, SINGLE) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_library_products_are_not_asked_for_fixed_bits():
    assert choice.problem_of(TORCH, CPU, SINGLE) is None
    assert choice.problem_of(dataclasses.replace(TORCH, general=nothing), CPU, SINGLE) is not None


def test_what_cannot_be_used_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"kernel='tritton' is unknown.*Did you mean 'triton'"):
        polar_factor(torch.eye(3), kernel="tritton")
    with pytest.raises(ValueError, match=r"polar_kernel='quack' with compile=True"):
        MuonConfig(lr=0.1, polar_kernel="quack", compile=True)
    weight = torch.nn.Parameter(torch.eye(3))
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="'quack', which cannot be used: quack-kernels is not"):
        Muon([weight], lr=0.1, polar_kernel="quack")
    monkeypatch.setattr(choice, "find_spec", lambda name: types.ModuleType(name))
    monkeypatch.setattr(choice, "_is_interpreted", lambda: False)
    optimizer = Muon([weight], lr=0.1, polar_kernel="triton", polar_dtype="float32")
    weight.grad = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="the matrices are on cpu, and it needs an NVIDIA"):
        optimizer.step()
    assert torch.equal(weight, torch.eye(3))


def test_compiled_iterations_keep_to_the_library(monkeypatch):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, backend="eager", **kw))
    monkeypatch.setattr(choice, "_missing", lambda name: None)
    x = torch.randn(6, 9)
    chosen = {"method": "gram", "coefficients": "tight", "steps": 4, "dtype": "float32"}
    found = orthogonalize(x, **chosen, compile=True, kernel="triton")
    torch.testing.assert_close(found, orthogonalize(x, **chosen), rtol=0, atol=1e-5)


def test_quack_gets_what_its_interface_takes(monkeypatch):
    calls = []

    def gemm_symmetric(A, B, C=None, out=None, *, alpha=1.0, beta=1.0):  # as in quack 0.4 to 0.6
        calls.append((alpha, beta))
        return multiply(A, B, C, alpha=alpha, beta=beta, out=out)

    interface = types.ModuleType("quack.gemm_interface")
    interface.gemm_symmetric = gemm_symmetric
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)
    monkeypatch.delitem(sys.modules, "hf_muon.polar.kernels.quack_products", raising=False)
    quack = choice._loaded("quack")
    assert quack.norm is norm
    X = torch.randn(2, 16, 24).bfloat16()
    A = quack.gram(X, out=torch.empty(2, 16, 16).bfloat16())
    assert torch.equal(A, X @ X.mT)
    P = quack.polynomial(A, -2.0, 1.5, out=torch.empty_like(A))
    assert torch.equal(P, torch.baddbmm(A, A, A, beta=-2.0, alpha=1.5))
    assert calls == [(1.0, 0.0), (1.5, -2.0)]
    quack.gram(X[:, :, :23], out=A)  # rows that begin anywhere
    assert len(calls) == 2
