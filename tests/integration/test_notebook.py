"""The notebook runs from top to bottom and prints what stands in it."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT

NOTEBOOK = ROOT / "recipes/ordering/momentum_as_a_spectral_filter.ipynb"
# Numbers are printed with two decimals; other linear algebra may round the last one the other way.
ONE_DIGIT = 0.0101
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
# Runs the cells that come on stdin in one namespace, and answers with what each of them printed.
RUNNER = """
import contextlib, io, json, sys
names, printed = {"__name__": "__main__"}, []
for cell in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(cell, names)
    printed.append(text.getvalue())
json.dump(printed, sys.stdout)
"""


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text())


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def committed(cell):
    streams = [out["text"] for out in cell["outputs"] if out["output_type"] == "stream"]
    return "".join("".join(lines) for lines in streams)


def agree(printed, kept):
    """Whether two texts have the same words, and numbers that differ by one in the last digit."""
    numbers = [[float(found) for found in NUMBER.findall(text)] for text in (printed, kept)]
    words = [NUMBER.sub("", text).split() for text in (printed, kept)]
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0, abs=ONE_DIGIT)


def test_its_cells_print_what_was_committed(notebook):
    cells = code_cells(notebook)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(["".join(cell["source"]) for cell in cells]),
        cwd=ROOT,
        env=os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)
    kept = [committed(cell) for cell in cells]
    assert sum(map(bool, kept)) >= 5
    for now, then in zip(printed, kept, strict=True):
        assert agree(now, then), f"{now}\nis not what the notebook shows:\n{then}"


def test_another_number_or_word_would_be_seen():
    assert agree("edge 1.87, T 5", "edge 1.88, T 5")
    assert not agree("edge 1.87, T 5", "edge 1.90, T 5")
    assert not agree("edge 1.87, T 5", "edge 1.87, T 6")
    assert not agree("edge 1.87", "gap 1.87")
    assert not agree("edge 1.87 1.87", "edge 1.87")


def test_it_is_small_complete_and_executed_in_order(notebook):
    assert NOTEBOOK.stat().st_size < 400_000
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [out["output_type"] for cell in cells for out in cell["outputs"]]
    assert kinds.count("display_data") == 2
    assert set(kinds) == {"stream", "display_data"}
