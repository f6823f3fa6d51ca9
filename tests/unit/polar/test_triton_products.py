"""The Triton kernels without a GPU: their numbers in Triton's interpreter, and their code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton (pip install triton)")
HERE = Path(__file__).parent


def run(*command, **environment):
    """Run in a process of its own: what a kernel is follows from the environment at its import."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**inherited, **environment}, cwd=HERE.parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
def test_in_the_interpreter():
    said = run(
        "-m", "pytest", "-p", "no:cacheprovider", HERE / "interpreted.py", TRITON_INTERPRET="1"
    )
    assert "passed" in said
    assert "skipped" not in said


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_kernels_compile_without_spills(architecture, tmp_path):
    found = json.loads(
        run(HERE / "compiled_kernels.py", architecture, tmp_path, TRITON_CACHE_DIR=str(tmp_path))
    )
    assert len(found) == 6
    for name, (instructions, fits, resources) in found.items():
        assert fits, name
        if "float32" not in name:
            assert instructions > 0, name  # of the tensor cores
        assert "STACK:0 " in resources, (name, resources)
        assert "LOCAL:0 " in resources, (name, resources)
