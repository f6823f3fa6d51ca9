"""The five-minute check of a GPU can be rehearsed on a CPU, and its tables pasted into a page."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.distributed.launch import ON_CPU, ROOT

SCRIPT = str(ROOT / "scripts" / "bench" / "gpu.py")
HEADINGS = [
    "Ceilings", "The bits of a matrix", "Sides that are no multiples", "Kernels of one product",
    "Steps, predicted / measured", "Polar factors of 8 matrices", "float32 and TF32",
]  # fmt: skip


def check(*arguments):
    environment = os.environ | ON_CPU | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page():
    # In Triton's interpreter the products take longer than all the rest; they have their own tests.
    done = check("--tiny")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tables(page):
    """The rows of each table by its heading, the first of them its columns."""
    found = {}
    for part in page.split("\n### ")[1:]:
        lines = part.splitlines()
        rows = [line for line in lines if line.startswith("|")]
        found[lines[0]] = [[cell.strip() for cell in row[1:-1].split(" | ")] for row in rows]
    return found


def test_every_section_has_its_table(page):
    found = tables(page)
    for heading in HEADINGS:
        assert sum(name.startswith(heading) for name in found) == 1, heading
    for columns, _, *rows in found.values():
        assert rows
        assert all(len(row) == len(columns) for row in rows)


def test_the_versions_are_said(page):
    assert f"torch {torch.__version__}" in page.splitlines()[0]
    assert "hf_muon 0" in page.splitlines()[0]


def test_steps_are_beside_their_predictions(page):
    [(columns, _, *rows)] = [rows for name, rows in tables(page).items() if name[:5] == "Steps"]
    launches = columns.index("launches")
    by_name = {(row[0], row[1]): row for row in rows}
    for model in ("130M", "1B", "LoRA r = 8"):
        ours, theirs = (
            int(by_name[model, name][launches].split(" / ")[0])
            for name in ("hf_muon", "torch.optim.Muon")
        )
        assert 0 < ours < theirs
    assert all(re.fullmatch(r"[\d.,]+ / [\d.,]+", row[columns.index("step ms")]) for row in rows)


def test_predictions_need_no_card():
    done = check("--tiny", "--predict", "--device", "h100")
    assert done.returncode == 0, done.stderr[-3000:]
    [(columns, _, *rows)] = tables(done.stdout).values()
    assert all(row[columns.index("step ms")].endswith(" / –") for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_to_do():
    done = check("--sections", "tf32")
    assert done.returncode == 2
    assert "--tiny rehearses the check on a CPU" in done.stderr
