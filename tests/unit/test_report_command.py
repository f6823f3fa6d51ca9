"""``hf-muon report`` makes one page of what a run leaves behind."""

import base64
import json
import re

import pytest
from typer.testing import CliRunner

import hf_muon.auto  # noqa: F401
from hf_muon import SpectralMonitor
from hf_muon.cli import app
from tests.integration.tiny import trained


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def headings(page):
    return re.findall("<h2>(.*)</h2>", page)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("a<run>")
    trained(
        path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        trainer_settings={
            "callbacks": [SpectralMonitor(every=2)],
            "eval_dataset": [{"input_ids": row, "labels": row} for row in [[1, 2, 3]] * 4],
        },
    )
    return path


def test_the_page_holds_figures_routes_and_versions(folder):
    result = run(folder)
    assert result.exit_code == 0, result.output
    page = (folder / "report.html").read_text()
    assert headings(page) == ["Losses", "Learning rates", "Spectra", "Routes", "Versions"]
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 3
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert "order=pre_polar" in page
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "transformers"):
        assert f"<td>{name}</td>" in page
    assert "http" not in page  # nothing is fetched when it is opened


def test_names_are_escaped(folder):
    assert "<h1>Run a&lt;run&gt;0</h1>" in (folder / "report.html").read_text()


def test_the_state_of_the_latest_checkpoint_is_taken(folder, tmp_path):
    for step in (9, 10):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        logged = [{"step": step, "loss": 1.0}] if step == 10 else []
        (path / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "log_history": logged})
        )
    run(tmp_path, "--output", tmp_path / "page.html")
    assert 'alt="loss"' in (tmp_path / "page.html").read_text()


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "spectra.jsonl").write_text(
        '{"begin": 0}\n{"step": 4, "layer": "", "warning": "the loss is nan"}\n'
    )
    assert run(tmp_path).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("No trainer_state.json") == 2
    assert "No samples in spectra.jsonl" in page
    assert "No muon_report.json" in page
    assert "<td>the loss is nan</td>" in page


def test_a_folder_of_no_run_and_a_damaged_file_are_errors_in_one_sentence(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "give the output_dir of a Trainer" in result.output
    (tmp_path / "muon_report.json").write_text("{")
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "muon_report.json is no JSON" in result.output
    assert "Traceback" not in result.output
