"""``hf-muon --version`` and ``hf-muon env``: a block for bug reports."""

from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from hf_muon.commands import env
from hf_muon.commands.cli import app


def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_version_is_one_line():
    assert run("--version") == f"hf-muon {version('hf-muon')}\n"


def test_the_block_has_versions_and_what_computes(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    lines = [line.split(None, 1) for line in run("env").splitlines()]
    found = {words[0]: words[1] for words in lines}
    assert found["torch"] == version("torch")
    assert found["no-such-package"] == "not installed"
    assert "core" in found["cpu"]
    (polar,) = [line for line in run("env").splitlines() if "polar factors" in line]
    assert "instructions for bfloat16" in polar
    assert polar.endswith("by torch")


@pytest.mark.parametrize("native", [True, False])
def test_the_dtype_follows_from_the_instructions(monkeypatch, native):
    monkeypatch.setattr("hf_muon.polar.precision.has_native_bfloat16", lambda *_: native)
    monkeypatch.setattr(env, "has_native_bfloat16", lambda *_: native)
    expected = ("has", "bfloat16") if native else ("has no", "float32")
    assert f"{expected[0]} instructions for bfloat16; polar factors in {expected[1]} by" in run(
        "env"
    )


def test_a_device_that_fails_leaves_the_rest(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("driver too old\nand more")

    monkeypatch.setattr(env, "products_for", fail)
    assert "fail: driver too old." in run("env")


def test_the_kernel_that_would_be_chosen_is_named_with_the_reason(monkeypatch):
    import warnings

    def chosen(*_, **__):
        warnings.warn("by torch's library: triton is off by 1", stacklevel=1)
        return type("Products", (), {"name": "torch"})

    monkeypatch.setattr(env, "products_for", chosen)
    assert env._polar_factors(torch.device("cpu")).endswith(
        "by torch (by torch's library: triton is off by 1.)"
    )
