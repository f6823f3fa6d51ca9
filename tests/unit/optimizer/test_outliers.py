"""Matrices that half precision takes out of range: zero in that step, float32 from the next."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hf_muon import Muon
from hf_muon.distributed.buckets import Unit
from hf_muon.optimizer import capturable, graphed
from hf_muon.optimizer.outliers import Outliers
from hf_muon.polar import devices, factor, orthogonalize
from hf_muon.polar.coefficients import FAMILIES, coefficients
from hf_muon.polar.outliers import zero_outliers_
from tests.unit.optimizer.recorded import recording

SETTINGS = {"polar_method": "newton_schulz", "polar_dtype": "bfloat16", "momentum": 0.0}


@pytest.mark.parametrize("name", ["quintic", "polar_express", "tight"])
@pytest.mark.parametrize("steps", [3, 4, 5, 8])
def test_only_what_left_the_range_is_replaced(name, steps):
    assert name in FAMILIES
    x = torch.randn(6, 20, 30)
    chosen = {"method": "newton_schulz", "coefficients": name, "steps": steps}
    factors = orthogonalize(x, **chosen, dtype="bfloat16")
    kept = factors.clone()
    factors[1] *= 2.2  # more than a tenth above the largest, 1.9, that any of these reach
    factors[2, 3, 4] = torch.nan
    factors[3, 0, 0] = -torch.inf
    flags = zero_outliers_(factors, coefficients(name, steps))
    assert flags.tolist() == [False, True, True, True, False, False]
    assert not factors[1:4].any()
    assert torch.equal(factors[[0, 4, 5]], kept[[0, 4, 5]])
    assert zero_outliers_(kept[0], coefficients(name, steps)).tolist() == [False]


@pytest.fixture
def diverging(monkeypatch):
    """An accelerator, on which bfloat16 takes matrices with a large first entry out of range."""
    iterate = factor.ITERATIONS["newton_schulz"]

    def diverge(X, *temporaries, **settings):
        large = X[..., :1, :1] > 0.5 * X.abs().sum((-2, -1), keepdim=True)
        found = iterate(X, *temporaries, **settings)
        return found.mul_(torch.where(large, 1e4, 1.0)) if X.dtype == torch.bfloat16 else found

    monkeypatch.setitem(factor.ITERATIONS, "newton_schulz", diverge)
    factor._iteration.cache_clear()
    monkeypatch.setattr(devices, "is_cpu", lambda device: False)
    yield
    factor._iteration.cache_clear()


def with_gradients():
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(6, 9), (9, 6), (6, 9)]]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    weights[1].grad = torch.eye(9, 6) / 100
    weights[1].grad[0, 0] = 1.0
    return weights


@pytest.mark.usefixtures("diverging")
@pytest.mark.parametrize("matrix_map", ["polar", "polargrad"])
def test_a_matrix_is_left_alone_once_and_computed_in_float32_from_then_on(matrix_map, caplog):
    weights = with_gradients()
    named = [(f"w{number}", weight) for number, weight in enumerate(weights)]
    optimizer = Muon(
        named, lr=1.0, adjust_lr="none", matrix_map=matrix_map, adamw_lr=1e-3, **SETTINGS
    )
    optimizer.step()
    assert not weights[1].any()
    assert weights[0].any()
    assert weights[2].any()
    assert not caplog.records

    before = [weight.detach().clone() for weight in weights]
    for _ in range(2):
        optimizer.step()
    [record] = caplog.records
    assert "The polar factor of w1 is not finite or too large" in record.message
    chosen = {"coefficients": "tight", "steps": 5, "dtype": "float32"}
    given = weights[1].grad.bfloat16()
    exact = orthogonalize(given, method="newton_schulz", **chosen).bfloat16()
    if matrix_map == "polargrad":
        exact = exact.float() * (given.float() * exact.float()).sum()
    # Two steps; what is written has been rounded to bfloat16 once or twice.
    torch.testing.assert_close(weights[1].detach(), -2 * exact.float(), rtol=0.02, atol=1e-3)
    for number in (0, 2):  # the others go on in bfloat16, as in the first step
        torch.testing.assert_close(weights[number].detach(), 3 * before[number])


def test_zeros_around_matrices_do_not_move_the_bound():
    """65 × 65 in a batch that is filled up to 128: 1.4 times as long would still be short there."""
    triples = coefficients("tight", 5)
    factors = torch.zeros(2, 128, 128)
    factors[:, range(65), range(65)] = torch.tensor([1.0, 1.35])[:, None]
    assert zero_outliers_(factors.clone(), triples).tolist() == [False, False]
    assert zero_outliers_(factors, triples, side=65).tolist() == [False, True]
    assert not factors[1].any()
    assert factors[0].any()


@pytest.mark.usefixtures("diverging")
def test_flags_of_several_devices_are_read(monkeypatch):
    """Each arrives by itself; a device that stands in for another one computes nothing."""
    found = Outliers()
    sent = [torch.tensor([False, True]), torch.empty(1, dtype=torch.bool, device="meta")]
    found.found = [(["a", "b"], sent[0]), (["c"], sent[1])]
    found.send()
    assert [one.units for one in found._sent] == [["a", "b"], ["c"]]
    found._sent.pop()
    found.read(str)
    assert found.known == {"b"}


@pytest.mark.usefixtures("diverging")
def test_what_is_computed_again_fits_what_travels_back():
    """Else the owner would apply digits that no other rank gets."""
    weights = with_gradients()
    for back in (torch.bfloat16, None):
        outliers = Outliers()
        unit = Unit(0, 0, (9, 6), ())
        outliers.known.add(unit)
        polar = partial(orthogonalize, method="newton_schulz", coefficients="tight", steps=4,
                        dtype="bfloat16")  # fmt: skip
        run = outliers.watched(lambda X, polar: polar(X, out=X), polar, [unit], back)
        X = weights[1].grad.clone()
        run(X)
        assert X.any()
        assert torch.equal(X, X.bfloat16().float()) is (back is not None)


def test_on_a_cpu_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(factor, "zero_outliers_", None)
    weights = with_gradients()
    Muon(weights, lr=1.0, **SETTINGS).step()
    assert all(weight.any() for weight in weights)
    monkeypatch.setattr(devices, "is_cpu", lambda device: False)
    with pytest.raises(TypeError):
        Muon(weights, lr=1.0, **SETTINGS).step()


@pytest.mark.usefixtures("diverging")
def test_a_replayed_step_flags_its_matrices_too(caplog, monkeypatch):
    found = []
    monkeypatch.setitem(capturable.KINDS, "cpu", recording(found))
    weights = with_gradients()
    outlier, usual = weights[1].grad, torch.randn(9, 6)
    named = [(f"w{number}", weight) for number, weight in enumerate(weights)]
    optimizer = Muon(named, lr=1.0, adjust_lr="none", cuda_graph=True, **SETTINGS)
    weights[1].grad = usual
    for _ in range(graphed.WARM_UP + 2):
        optimizer.step()
    [recorder] = found
    assert recorder.replays == 2
    weights[1].grad = outlier
    before = weights[1].detach().clone()
    optimizer.step()
    assert recorder.replays == 3
    assert torch.equal(weights[1], before)
    assert not caplog.records
    optimizer.step()  # under another key, and with another update
    assert "The polar factor of w1 is not finite or too large" in caplog.records[0].message
    assert not torch.equal(weights[1], before)
    assert recorder.replays == 3
