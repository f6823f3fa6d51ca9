"""The compute dtype: what ``auto`` means on each kind of device."""

from __future__ import annotations

import pytest
import torch

from hf_muon.polar import factor, in_own_dtype, orthogonalize, precision


@pytest.fixture(autouse=True)
def _fresh_answers(monkeypatch):
    for question in (precision.has_native_bfloat16, precision.has_float16_tensor_cores):
        question.cache_clear()
    yield
    monkeypatch.undo()
    for question in (precision.has_native_bfloat16, precision.has_float16_tensor_cores):
        question.cache_clear()


@pytest.mark.parametrize("requested", [None, "auto"])
@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_follows_the_hardware(requested, native, expected, monkeypatch):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda *_: native)
    assert precision.compute_dtype(requested, torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16)],
)
def test_gpus_without_bfloat16_take_float16_if_they_have_tensor_cores(
    capability, expected, monkeypatch
):
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert precision.compute_dtype("auto", torch.device("cuda", 0)) == expected
    assert precision.compute_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda *_: True)
    assert precision.compute_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16


@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
@pytest.mark.parametrize(("coefficients", "steps"), [("quintic", 5), ("tight", 4)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_float16_is_as_close_as_float32_whatever_the_size(
    size, coefficients, steps, method, monkeypatch
):
    x = size * torch.randn(24, 40)
    chosen = {"coefficients": coefficients, "steps": steps, "dtype": "float32"}
    exact = orthogonalize(x, **{**chosen, "method": "svd"})

    def error(dtype):
        monkeypatch.setattr(factor, "compute_dtype", lambda *_: dtype)
        found = orthogonalize(x, **chosen, method=method)
        assert found.dtype == dtype
        return ((found.float() - exact).norm() / exact.norm()).item()

    # The coefficients leave 0.1 to 0.2 by themselves; roundings to 11 bits, 5e-4, add little.
    assert error(torch.float16) <= error(torch.float32) + 0.005


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
    with pytest.raises(ValueError, match=r"polar_dtype \(dtype of polar_factor\) is .*slower"):
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


# --- float32 in float32 ---------------------------------------------------------------------------

CUDA, ONEDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def float32_settings():
    """All that says how products of float32 are computed; None where torch sees a contradiction."""
    found = [CUDA.fp32_precision, ONEDNN.fp32_precision, torch.backends.fp32_precision]
    for ask in (torch.get_float32_matmul_precision, lambda: CUDA.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError:
            found.append(None)
    return found


@pytest.fixture
def _settings_restored():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = ONEDNN.fp32_precision = "none"


SETTERS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
    "tf32 for CUDA": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "tf32=True of the Trainer": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "bf16 for oneDNN": lambda: setattr(ONEDNN, "fp32_precision", "bf16"),
}


@pytest.mark.usefixtures("_settings_restored")
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("name", SETTERS)
def test_float32_is_computed_in_float32_whatever_is_set_outside(name, device_type):
    SETTERS[name]()
    before = float32_settings()

    def fail():
        with in_own_dtype(device_type):
            inside = float32_settings()
            assert inside[device_type == "cpu"] in ("ieee", "none")
            # As torch.compile asks for it: without a contradiction, unless it is none of ours.
            assert None not in inside or inside == before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert float32_settings() == before


@pytest.mark.usefixtures("_settings_restored")
def test_a_setting_that_was_inherited_is_inherited_again():
    torch.backends.fp32_precision = "tf32"
    with in_own_dtype("cuda"):
        assert CUDA.fp32_precision == "ieee"
    torch.backends.fp32_precision = "ieee"
    assert CUDA.fp32_precision == "ieee"


@pytest.mark.usefixtures("_settings_restored")
@pytest.mark.parametrize("method", ["newton_schulz", "gram", "svd"])
def test_polar_factors_in_float32_are_computed_in_float32(method, monkeypatch):
    torch.set_float32_matmul_precision("medium")
    asked = []
    prescale = factor.prescale

    def recorded(*args, **kwargs):
        asked.append((ONEDNN.fp32_precision, torch.is_autocast_enabled("cpu")))
        return prescale(*args, **kwargs)

    monkeypatch.setattr(factor, "prescale", recorded)
    chosen = {"method": method, "coefficients": "quintic", "steps": 5, "dtype": "float32"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        orthogonalize(torch.randn(4, 6), **chosen)
    assert asked == [("ieee", False)]
    assert ONEDNN.fp32_precision == "bf16"
