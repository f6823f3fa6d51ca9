"""Every example runs by the command in its docstring, and its loss falls."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.distributed.launch import ON_CPU, ON_LOOPBACK, ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", *ON_LOOPBACK]


def command(example):
    """The command in the docstring, with files by their full paths."""
    _, line = ast.get_docstring(ast.parse(example.read_text())).split("\n\n")
    program, *words = line.split()
    launcher = {"python": [sys.executable], "torchrun": TORCHRUN}[program]
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    assert str(example) in words
    return [*launcher, *words]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_learns(example, tmp_path):
    assert len(example.read_text().splitlines()) <= 40
    environment = os.environ | ON_CPU | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command(example), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (first, last) = re.search(r"^loss (\S+) -> (\S+)$", done.stdout, re.MULTILINE).groups()
    assert float(last) < 0.9 * float(first)


def test_the_page_names_every_example():
    page = (ROOT / "examples" / "README.md").read_text()
    assert len(EXAMPLES) == 5
    assert all(f"({path.name})" in page for path in EXAMPLES)
