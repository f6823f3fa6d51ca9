"""Devices without float64: every rule trains, in float32, to the rounding of its sums."""

import pytest
import torch

from hf_muon.optimizer.lora import whitening
from hf_muon.polar import devices
from tests.elsewhere import DEVICE, elsewhere
from tests.every_rule import PAIRS, RULES, run_of

# Sums of squares over some hundred entries in float32 instead of float64, in three steps: 2e-6 was
# seen. Gram matrices are squares, whose rounding the inverse magnifies.
ROUNDING = {**dict.fromkeys(RULES, 1e-5), **dict.fromkeys(PAIRS, 1e-4)}


def trained(name, has_float64, monkeypatch):
    """What three steps add to all weights."""
    dtype = torch.float64 if has_float64 else torch.float32
    monkeypatch.setattr(devices, "widest", lambda device: dtype)
    with elsewhere(*(() if has_float64 else (torch.float64,))):
        optimizer, weights, given = run_of(name, device=DEVICE)
        start = [weight.detach().to("cpu", copy=True) for weight in weights]
        for step in given:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient
            optimizer.step()
        end = [weight.detach().to("cpu") for weight in weights]
    return torch.cat([(b - a).flatten().double() for a, b in zip(start, end, strict=True)])


@pytest.mark.parametrize("name", [*RULES, *PAIRS])
def test_every_rule_trains_without_float64(name, monkeypatch):
    expected = trained(name, True, monkeypatch)
    found = trained(name, False, monkeypatch)
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= ROUNDING[name]
    other = "rows" if name == "default" else "default"
    if name in RULES and name not in ("auto", "without zeros"):  # which begin as the default does
        control = trained(other, True, monkeypatch)
        assert (found - control).norm() > 100 * ROUNDING[name] * control.norm()


@pytest.mark.parametrize("name", ["rows", "product"])
def test_float64_would_be_noticed(name, monkeypatch):
    monkeypatch.setattr(devices, "widest", lambda device: torch.float64)
    with elsewhere(torch.float64):
        optimizer, weights, [gradients, *_] = run_of(name, device=DEVICE)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        with pytest.raises(TypeError, match=r"gives torch\.float64"):
            optimizer.step()


def test_the_device_that_has_none_is_mps():
    found = {kind: devices.widest(torch.device(kind)) for kind in ("cpu", "cuda", "xpu", "mps")}
    assert {kind for kind, dtype in found.items() if dtype == torch.float32} == {"mps"}
    assert set(found.values()) == {torch.float32, torch.float64}


@pytest.mark.parametrize("length", [64, 4096])
def test_a_singular_factor_is_whitened_in_float32_whatever_the_damping(length, monkeypatch):
    rows = torch.randn(1, length).expand(16, length).contiguous()
    monkeypatch.setattr(devices, "widest", lambda device: torch.float32)
    narrow = whitening(rows, 1e-8)
    assert narrow.dtype == torch.float32
    assert narrow.isfinite().all()
    monkeypatch.undo()
    wide = whitening(rows, max(1e-8, length * torch.finfo(torch.float32).eps))
    # What it makes of the factor itself: one direction of length 1.
    for found in (narrow, wide):
        assert torch.linalg.matrix_norm(found.float() @ rows, 2).item() == pytest.approx(
            1, abs=0.02
        )
