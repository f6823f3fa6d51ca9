"""``hf-muon report --board`` compares runs by what they recorded, and guesses nothing."""

import json
import re

import pytest
from typer.testing import CliRunner

from hf_muon.commands.cli import app
from hf_muon.commands.runs import read_run


def results(losses, **more):
    """What a recipe leaves; a step has 100 tokens, and every tenth is evaluated."""
    curve = [{"step": 10 * n, "loss": loss} for n, loss in enumerate(losses)]
    steps = 10 * (len(losses) - 1)
    found = {"optim": "adamw_torch_fused", "learning_rate": 0.002, "other_learning_rate": 0.016}
    return {**found, "steps": steps, "tokens": 100 * steps, "eval_curve": curve, **more}


def board(*arguments):
    return CliRunner().invoke(app, ["report", "--board", *map(str, arguments)])


def rows(page):
    found = re.findall("<tr>(<td>.*?)</tr>", page)
    return [re.findall("<td>(.*?)</td>", row) for row in found]


@pytest.fixture
def folder(tmp_path):
    muon = {"optimizer": "Muon", "config": {"order": "pre_polar", "momentum": 0.95}}
    muon["groups"] = [{"algorithm": "muon", "lr": 0.01}, {"algorithm": "adamw", "lr": 0.02}]
    for name, content in (
        ("a", results([6, 5, 4], optimizer_share=0.01, cpu_seconds=100.0)),
        ("b", results([6, 4, 3], optim="muon", joules=1234.0, optimizer_state_bytes=5_000_000)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    (tmp_path / "b" / "muon_report.json").write_text(json.dumps(muon))
    return tmp_path


def test_runs_are_compared_at_the_highest_last_loss(folder):
    result = board(folder)
    assert result.exit_code == 0, result.output
    page = (folder / "board.html").read_text()
    assert rows(page) == [
        ["a", "4.0000", "2.00 k", "2.00 k", "20"],
        ["b", "3.0000", "2.00 k", "1.00 k", "10"],
        ["a", "adamw_torch_fused", "–", "–", "0.002", "0.016"],
        ["b", "muon", "pre_polar", "0.95", "0.01", "0.02"],
        ["a", "not recorded", "1.0%", "not recorded", "100 s of CPU"],
        ["b", "not recorded", "not recorded", "5 MB", "1.23 kJ (RAPL)"],
    ]
    assert "Target: validation loss 4.0000 on the curve, the highest of the runs" in page
    assert 'aria-label="validation loss"' in page
    assert "prefers-color-scheme: dark" in page
    assert "http" not in page


def test_a_run_may_begin_at_the_target(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results([3, 4])))
    board(tmp_path)
    assert rows((tmp_path.parent / "board.html").read_text())[0][3:] == ["0", "0"]


def test_a_target_and_an_estimate_are_asked_for(folder):
    board(
        folder / "a",
        folder / "b",
        "--target",
        3.5,
        "--watts-per-core",
        10,
        "--output",
        folder / "x",
    )
    found = rows((folder / "x").read_text())
    assert found[0][3:] == ["never", "never"]
    assert found[1][3:] == ["1.50 k", "15"]
    assert found[4][-1] == "≈ 1 kJ (estimate)"
    assert found[5][-1] == "1.23 kJ (RAPL)"


def test_what_nobody_recorded_is_not_guessed(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    assert board(tmp_path, "--watts-per-core", 10).exit_code == 0
    page = (tmp_path.parent / "board.html").read_text()
    assert {cell for row in rows(page) for cell in row[1:]} == {"not recorded", "–"}
    assert "None of the 1 runs has logged a loss" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "There is no folder"),
        (["a", "a/../a"], "A run is given twice"),
        (["a", "--watts-per-core", "0"], "above 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    result = board(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_steps_to_a_loss_are_interpolated_between_what_was_logged(folder):
    run = read_run(folder / "a")
    assert run.steps_to(6.5, "eval_loss") == 0
    assert run.steps_to(5.25, "eval_loss") == pytest.approx(7.5)
    assert run.steps_to(3.9, "eval_loss") is None
