"""``hf-muon route --observe RUN``: from a run with a monitor to settings of the next one."""

import json

import pytest
from typer.testing import CliRunner

import hf_muon.auto  # noqa: F401
from hf_muon import MuonConfig, SpectralMonitor, route
from hf_muon.commands.cli import app
from hf_muon.diagnostics.history import read_spectra
from tests.integration.tiny import tiny_data, tiny_llama, trained

DATA = [{k: row % 24 for k, row in one.items()} for one in tiny_data()]
DOWN = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]


def run(*arguments):
    return CliRunner().invoke(app, ["route", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    monitor = SpectralMonitor(".", every=2)
    settings = {"trainer_settings": {"callbacks": [monitor]}, "data": DATA}
    trained(folder, max_steps=8, optim_args="adamw_params=layers\\.0\\..*k_proj", **settings)
    return folder


def changed(folder, tmp_path, change, report=True):
    """The same run with other numbers in its samples."""
    lines = (folder / "spectra.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if "layer" in record:
            change(record)
    (tmp_path / "spectra.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    if report:
        (tmp_path / "muon_report.json").write_text((folder / "muon_report.json").read_text())
    return tmp_path


def high_inputs_of(*names):
    def change(record):
        record["input_stable_rank"] = 1e4 if record["layer"] in names else 1.0

    return change


def printed_patterns(output):
    (line,) = [line for line in output.splitlines() if line.startswith("adamw_params=")]
    return MuonConfig.from_optim_args(f"lr=0.1,{line}").adamw_params


def test_a_run_gives_numbers_for_every_layer(folder):
    result = run("--observe", folder)
    assert result.exit_code == 0, result.output
    assert "in model.layers" in result.output
    table = result.output.split("nuc G:")[0]
    assert table.count("_proj") == 13  # one of fourteen went to AdamW
    assert "–" not in "".join(line for line in table.splitlines() if "noise" in line)
    facts = json.loads(run("--observe", folder, "--json").output)
    samples = read_spectra(folder)
    for layer in facts["layers"]:
        own = [s for s in samples if s["layer"] == layer["layer"]][-2:]
        ratios = sorted(s["gradient_nuclear_rank"] / s["input_stable_rank"] for s in own)
        assert layer["ratio"] == pytest.approx(sum(ratios) / 2)
        assert layer["spectral"] == (layer["ratio"] >= 1)
    assert all(len(line) <= 100 for line in result.output.splitlines() if "=" not in line[:20])


def test_a_file_gives_what_its_folder_does(folder):
    assert run("--observe", folder / "spectra.jsonl").output == run("--observe", folder).output


def test_the_printed_settings_send_the_layers_away_and_keep_what_was_sent_before(folder, tmp_path):
    result = run("--observe", changed(folder, tmp_path, high_inputs_of(*DOWN)))
    assert result.exit_code == 0, result.output
    patterns = printed_patterns(result.output)
    assert patterns == (
        r"layers\.0\..*k_proj",
        r"^model\.layers\.(0|1)\.mlp\.down_proj\.weight$",
    )
    plan = route(tiny_llama(), MuonConfig(lr=0.1, adamw_params=patterns))
    sent = {one.name for one in plan.adamw if "_proj" in one.name}
    assert sent == {*DOWN, "model.layers.0.self_attn.k_proj.weight"}
    assert "favors AdamW in 2 of 13" in result.output
    facts = json.loads(run("--observe", tmp_path, "--json").output)
    assert tuple(facts["adamw_params"]) == patterns
    assert MuonConfig.from_optim_args(facts["optim_args"]).adamw_params == patterns


def test_without_a_report_only_new_patterns_are_printed(folder, tmp_path):
    changed(folder, tmp_path, high_inputs_of(*DOWN), report=False)
    assert len(printed_patterns(run("--observe", tmp_path).output)) == 1


def test_where_every_matrix_fails_no_setting_is_printed(folder, tmp_path):
    changed(folder, tmp_path, lambda record: record.update(input_stable_rank=1e4))
    result = run("--observe", tmp_path)
    assert result.exit_code == 0
    assert "use a stock AdamW" in result.output
    assert "adamw_params=" not in result.output


def test_layers_without_inputs_are_undecided_and_unwatched_ones_are_counted(folder, tmp_path):
    changed(folder, tmp_path, lambda record: record.pop("input_stable_rank"))
    lines = (tmp_path / "spectra.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "layers.1" not in line or '"begin"' in line]
    (tmp_path / "spectra.jsonl").write_text("".join(kept))
    output = run("--observe", tmp_path).output
    assert "in 0 of 0 matrices" in output
    assert "7 parameters of Muon were not watched" in output
    assert output.count(" ?\n") == 6


def test_momentum_comes_from_the_smallest_window(folder, tmp_path):
    def change(record):
        record.pop("t_min", None)
        if record["layer"] == DOWN[0]:
            record["t_min"] = 4.0

    output = run("--observe", changed(folder, tmp_path, change)).output
    assert output.count("0.750") == 2  # in its row, and for all
    assert "momentum=0.750 or more shows all directions above the edge" in output


def test_long_names_stay_within_the_width(folder, tmp_path):
    def change(record):
        record["layer"] = record["layer"].replace("model.", "x" * 70 + ".") + "y" * 70

    output = run("--observe", changed(folder, tmp_path, change, report=False)).output
    assert all(len(line) <= 100 for line in output.splitlines() if "adamw_params" not in line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--observe", "{empty}"], "holds no spectra.jsonl"),
        (["--observe", "{empty}/nothing.jsonl"], "holds no spectra.jsonl"),
        (["--observe", "{old}"], "No sample of a gradient's nuclear rank"),
        (["model", "--observe", "{empty}"], "reads a run and no model"),
        (["--observe", "{empty}", "--full"], "reads a run and no model"),
        ([], "or --observe RUN"),
    ],
)
def test_errors_say_what_to_do(tmp_path, arguments, message):
    old = tmp_path / "old"
    old.mkdir()
    (old / "spectra.jsonl").write_text('{"step": 1, "layer": "w", "visible_rank": 1.0}\n')
    result = run(*(a.format(empty=tmp_path, old=old) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    if "holds no" in message:
        assert "SpectralMonitor(layers='.', every=50)" in result.stderr
