"""``hf-muon report`` makes one page of what a run leaves behind."""

import json
import re

import pytest
from typer.testing import CliRunner

import hf_muon.auto  # noqa: F401
from hf_muon import SpectralMonitor
from hf_muon.commands.cli import app
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
    assert headings(page) == ["Losses and learning rates", "Spectra", "Routes", "Versions"]
    assert re.findall('<svg role="img" aria-label="(.*?)"', page) == [
        "loss", "learning rate", "spectra",
    ]  # fmt: skip
    for name in ("mlp.up_proj.weight", "lm_head.weight", "transformers"):
        assert f"<td>{name}</td>" in page
    assert "http" not in page  # nothing is fetched when it is opened


def test_it_begins_with_a_summary(folder):
    run(folder)
    page = (folder / "report.html").read_text()
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["Model"] == "LlamaForCausalLM, 23.7 k trained parameters in 21 tensors"
    assert facts["Optimizer"].startswith("Muon (hf_muon ")
    assert "order=pre_polar" in facts["Optimizer"]
    assert facts["Progress"] == "4 of 4 steps, finished"
    assert re.fullmatch(r"validation \d\.\d{4}.*, training \d\.\d{4}", facts["Loss"])
    assert page.index("<dl") < page.index("<h2>")


def test_layers_that_are_alike_are_one_fold(folder):
    run(folder)
    page = (folder / "report.html").read_text()
    summaries = re.findall("<summary>(.*?) <span>(.*?)</span>", page)
    assert summaries == [
        ("model.layers.0 to 1, 2 alike", "7 by Muon, 2 by AdamW"),
        ("outside of the layers", "3 by AdamW"),
    ]
    assert page.count("<td>mlp.up_proj.weight</td><td>48 × 32</td>") == 1


def test_layers_that_differ_are_folds_of_their_own(tmp_path):
    routes = [
        {"name": f"h.{layer}.w", "shape": [2, 2], "algorithm": algorithm, "reason": "r"}
        for layer, algorithm in enumerate(("muon", "muon", "adamw", "muon"))
    ]
    about = {"optimizer": "Muon", "routing": {"routes": routes}}
    (tmp_path / "muon_report.json").write_text(json.dumps(about))
    run(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.findall("<summary>(.*?) <span>", page) == ["h.0 to 1, 2 alike", "h.2", "h.3"]


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
    assert 'aria-label="loss"' in (tmp_path / "page.html").read_text()


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "spectra.jsonl").write_text(
        '{"begin": 0}\n{"step": 4, "layer": "", "warning": "the loss is nan"}\n'
    )
    assert run(tmp_path).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "Looked for trainer_state.json, here and in checkpoint-*" in page
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
    assert "muon_report.json' is not a readable JSON file" in result.output
    assert "Traceback" not in result.output


def test_a_folder_that_is_not_there_and_one_of_several_runs_are_told_apart(tmp_path):
    assert "There is no folder" in run(tmp_path / "nosuch").output
    (tmp_path / "muon").mkdir()
    (tmp_path / "muon" / "muon_report.json").write_text("{}")
    result = run(tmp_path)
    assert result.exit_code == 2
    assert f"such as {tmp_path / 'muon'}" in result.output


def test_curves_are_those_of_a_recipe_where_there_is_no_state(tmp_path):
    curve = [{"step": step, "loss": 1 / step, "tokens": 9} for step in (1, 2)]
    (tmp_path / "results.json").write_text(json.dumps({"train_curve": curve, "eval_curve": curve}))
    assert run(tmp_path).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert 'aria-label="loss"' in page
    assert 'learning rate"' not in page


WRONG = {
    "trainer_state.json": [
        "[]", "3", "[" * 100_000, "\xff", '{"log_history": 3}', '{"log_history": [3]}',
        '{"log_history": [{"loss": 1}]}', '{"log_history": [{"step": "a", "loss": 1}]}',
        '{"log_history": [{"step": 1e999, "loss": 1}]}', '{"log_history": [], "global_step": []}',
        '{"global_step": 1}', '{"log_history": [{"step": 1, "loss": ' + "1" * 400 + "}]}",
        '{"log_history": [], "max_steps": ' + "1" * 400 + "}",
    ],
    "results.json": ['{"train_curve": 3}', '{"eval_curve": [{"step": 1}]}', '{"eval_curve": [3]}'],
    "muon_report.json": [
        "[1]", '{"optimizer": 3}', '{"routing": {}}', '{"optimizer": "a", "routing": 3}',
        '{"optimizer": "a", "routing": {"routes": [3]}}', '{"optimizer": "a", "versions": []}',
        '{"optimizer": "a", "routing": {"routes": [{"name": 1, "shape": 1}]}}',
    ],
    "spectra.jsonl": ['{"step": 1}', "[1]", "3", '{"begin": 0}\n{"step": "a", "warning": 1}'],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name in WRONG for content in WRONG[name]],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_content_of_another_form_is_one_sentence_that_names_the_file(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="latin-1")
    result = run(tmp_path)
    assert result.exit_code == 2, result.output
    assert str(tmp_path / name) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert len(result.stderr) < 1000


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 0, "log_history": []}')
    assert run(tmp_path).exit_code == 0
    assert "Looked among 0 logged quantities" in (tmp_path / "report.html").read_text()


def test_several_runs_take_a_board(tmp_path):
    result = run(tmp_path, tmp_path)
    assert (result.exit_code, "add --board" in result.stderr) == (2, True)
    result = run(tmp_path, "--target", "3")
    assert (result.exit_code, "are for --board" in result.stderr) == (2, True)


def test_curves_that_coincide_are_told_apart(tmp_path):
    history = [{"step": s, "learning_rate": 1 / s, "adamw/lr": 1 / s} for s in range(1, 9)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run(tmp_path)
    page = (tmp_path / "report.html").read_text()
    lines = re.findall('id="line2d_[^>]*>\\s*<path d="[^"]*" clip-path=[^>]*style="([^"]*)"', page)
    lines = [style for style in lines if "#0072b2" in style or "#d55e00" in style]
    assert len({*lines}) == 2
    assert [("dasharray" in style) for style in lines] == [False, True]  # the later is on top


def test_values_that_are_no_numbers_are_not_drawn(tmp_path):
    entries = [{"step": 1, "loss": "a"}, {"step": 2, "loss": 1.0, "note": [1]}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert run(tmp_path).exit_code == 0
    assert 'aria-label="loss"' in (tmp_path / "report.html").read_text()
