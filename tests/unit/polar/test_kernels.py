"""Products that are computed by half and mirrored."""

from __future__ import annotations

import pytest
import torch

from hf_muon.polar import orthogonalize
from hf_muon.polar.kernels import HALVES, halves
from tests.reference import polar as reference


@pytest.mark.parametrize("s", [128, 256, 391, 1100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mirrored_product_is_the_product(s, dtype):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(s, 24, generator=generator, dtype=torch.float64).to(dtype)
    A = X @ X.mT
    exact = 2 * A.double() + 0.5 * (A.double() @ A.double())

    def product(*factors, **settings):
        return HALVES.symmetric(*factors, **settings, out=torch.empty_like(A))

    def agrees(found, exact):
        # An entry of the largest size is rounded once, and its partial sums in another order.
        tolerance = 16 * torch.finfo(dtype).eps * exact.abs().max()
        return bool((found.double() - exact).abs().max() <= tolerance)

    mirrored = product(A, A, A, beta=2.0, alpha=0.5)
    assert agrees(mirrored, exact)
    assert not agrees(product(A, A, A, beta=2.0, alpha=0.7), exact)
    assert agrees(product(X, X.mT), X.double() @ X.double().mT)
    assert not agrees(1.3 * product(X, X.mT), X.double() @ X.double().mT)
    if halves.strips_of(A) > 1:
        assert torch.equal(mirrored[:64, -64:], mirrored[-64:, :64].mT)  # outside the diagonal


def test_large_matrices_on_a_cpu_are_cut_and_others_are_not():
    half, single = torch.bfloat16, torch.float32
    for s, dtype, expected in [
        (191, half, 1), (384, half, 2), (768, half, 4), (4096, half, 8),
        (255, single, 1), (256, single, 2), (2048, single, 8), (0, single, 1),
    ]:  # fmt: skip
        assert halves.strips_of(torch.empty(s, 4, dtype=dtype)) == expected
    assert halves.strips_of(torch.empty(2, 768, 4)) == 1
    assert halves.strips_of(torch.empty(768, 4, device="meta")) == 1


@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
@pytest.mark.parametrize("coefficients", ["polar_express", "tight"])
def test_mirroring_changes_the_factor_by_rounding_only(method, coefficients, monkeypatch):
    x = reference.matrix(256, 300, "1/k").float()
    chosen = {"method": method, "coefficients": coefficients, "steps": 5, "dtype": "float32"}
    mirrored = orthogonalize(x, **chosen)
    monkeypatch.setattr(halves, "strips_of", lambda A: 1)
    plain = orthogonalize(x, **chosen)
    assert not torch.equal(mirrored, plain)
    # float32 rounds at 6e-8, and XXᵀ squares the spread of the singular values, 256.
    assert reference.relative_error(mirrored, plain) < 1e-2
    assert reference.relative_error(orthogonalize(-x, **chosen), plain) > 1


def test_what_agrees_with_torch_is_never_mirrored(monkeypatch):
    x = reference.matrix(256, 300).float()
    chosen = {"method": "newton_schulz", "steps": 5, "dtype": "float32"}
    before = orthogonalize(x, coefficients="quintic", **chosen)
    monkeypatch.setattr(halves, "strips_of", lambda A: 1)
    assert torch.equal(orthogonalize(x, coefficients="quintic", **chosen), before)
