"""The compute dtype: what ``auto`` means on each kind of device."""

from __future__ import annotations

import pytest
import torch

from hf_muon.polar import orthogonalize, precision


@pytest.fixture(autouse=True)
def _fresh_answers():
    precision.has_native_bfloat16.cache_clear()
    yield
    precision.has_native_bfloat16.cache_clear()


@pytest.mark.parametrize("requested", [None, "auto"])
@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_follows_the_hardware(requested, native, expected, monkeypatch):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda *_: native)
    assert precision.compute_dtype(requested, torch.device("cpu")) == expected


@pytest.mark.parametrize("flags", [(), ("_is_avx512_bf16_supported",), ("_is_amx_tile_supported",)])
def test_x86_needs_one_of_its_two_instruction_sets(flags, monkeypatch):
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in flags, raising=False)
    assert precision.has_native_bfloat16("cpu") == bool(flags)


def test_x86_without_a_way_to_ask_counts_as_no(monkeypatch):
    monkeypatch.setattr(precision.platform, "machine", lambda: "AMD64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not precision.has_native_bfloat16("cpu")


@pytest.mark.parametrize("answer", [True, False])
def test_arm_asks_onednn(answer, monkeypatch):
    monkeypatch.setattr(precision.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: answer)
    assert precision.has_native_bfloat16("cpu") == answer


def test_unknown_devices_count_as_no():
    assert not precision.has_native_bfloat16("meta")


def test_float16_is_for_accelerators():
    assert precision.compute_dtype("float16", torch.device("cuda", 0)) == torch.float16
    with pytest.raises(ValueError, match="slower"):
        precision.compute_dtype("float16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "method", "dtype", "computed"),
    [
        ((16, 64), "auto", None, torch.float32),
        ((3, 64, 8), "gram", "auto", torch.float32),
        ((17, 64), "auto", None, torch.bfloat16),
        ((16, 64), "auto", "bfloat16", torch.bfloat16),
        ((16, 16), "auto", None, torch.bfloat16),
    ],
)
def test_few_rows_are_computed_in_float32_on_a_cpu(shape, method, dtype, computed, monkeypatch):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda *_: True)
    chosen = {"method": method, "coefficients": "quintic", "steps": 5, "dtype": dtype}
    assert orthogonalize(torch.randn(shape), **chosen).dtype == computed
    elsewhere = orthogonalize(torch.empty(shape, device="meta"), **chosen)
    assert elsewhere.dtype == torch.bfloat16
