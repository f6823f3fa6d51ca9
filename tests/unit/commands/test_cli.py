"""``hf-muon route`` prints a plan from a config alone, and errors are one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from hf_muon.commands.cli import app

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def folder(tmp_path):
    def write(**values):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **values}))
        return tmp_path

    return write


def run(*arguments: object):
    return CliRunner().invoke(app, ["route", *map(str, arguments)])


def test_a_folder_and_a_file_give_the_same_table(folder):
    path = folder()
    result, from_file = run(path), run(path / "config.json")
    assert result.exit_code == 0, result.output
    assert result.output == from_file.output
    assert "model.layers.0.self_attn.q_proj.weight" in result.output
    assert "15,360 parameters in 14 matrices" in result.output
    assert "Optimizer state:" in result.output


def state(path, optim_args: str = "") -> dict[str, int]:
    result = run(path, "--json", *(["--optim-args", optim_args] if optim_args else []))
    return json.loads(result.output)["state_bytes"]


def test_state_bytes_follow_order_and_dtypes(folder):
    matrices, rest, tensors, others = 15_360, 8_352, 14, 7
    path = folder()
    found = state(path)
    assert found["muon"] == 4 * matrices + 4 * tensors
    assert found["adamw"] == 8 * rest + 4 * others
    assert found["adamw_only"] == 8 * (matrices + rest) + 4 * (tensors + others)
    assert state(path, "order=polar_only")["muon"] == 4 * tensors
    assert state(path, "momentum_dtype=bfloat16")["muon"] == 2 * matrices + 4 * tensors
    path = folder(dtype="bfloat16")
    assert state(path)["muon"] == 2 * matrices + 4 * tensors
    assert state(path, "momentum_dtype=float32")["muon"] == 4 * matrices + 4 * tensors


def test_settings_and_auto_classes_reach_the_plan(folder):
    path = folder()
    sent_away = json.loads(run(path, "--json", "--optim-args", "adamw_params=q_proj").output)
    assert sent_away["totals"]["muon_matrices"] == 12
    classifier = run(path, "--auto", "sequence-classification")
    assert "score.weight" in classifier.output
    unnamed = folder(architectures=None)
    assert "lm_head.weight" in run(unnamed).output


def test_long_plans_are_folded_unless_asked(folder):
    path = folder(num_hidden_layers=16)
    assert "model.layers.*.mlp.up_proj.weight  (16 times)" in run(path).output
    assert "model.layers.15.mlp.up_proj.weight" in run(path, "--full").output


def test_an_adapter_folder_shows_the_adapter(folder, tmp_path, caplog):
    pytest.importorskip("peft")
    base = folder()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 4,
        "target_modules": ["q_proj"],
        "init_lora_weights": "pissa",
        "inference_mode": True,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    result = run(adapter)
    assert result.exit_code == 0, result.output
    assert "LoRA factor A" in result.output
    assert "4 matrices of 4 tensors" in result.output
    assert "other adapters" not in caplog.text
    shutil.copytree(adapter, tmp_path / "second")
    (tmp_path / "second").rename(adapter / "second")
    assert "4 matrices of 4 tensors" in run(adapter).output
    assert "has other adapters, left out here: second." in caplog.text
    shutil.rmtree(adapter / "second")
    # PEFT saves an adapter that is not called "default" in a folder of its name.
    (tmp_path / "run").mkdir()
    adapter.rename(tmp_path / "run" / "mine")
    named = run(tmp_path / "run").output
    assert "lora_A.mine.weight" in named
    assert "lora_A.default.weight" in result.output


def test_nothing_for_muon_prints_the_table_and_fails(folder):
    result = run(folder(), "--optim-args", "adamw_params=.")
    assert result.exit_code == 1
    assert "model.norm.weight" in result.stdout
    assert "Nothing to train with Muon" in result.stderr


ERRORS = {
    "missing file": (["nowhere/config.json"], "'nowhere/config.json' does not exist."),
    "misspelt file": (["{path}/confg.json"], "Did you mean 'config.json'?"),
    "unknown id": (["no-such/model-anywhere"], "gives no model config"),
    "unknown auto class": (["{path}", "--auto", "cat"], "auto='cat' is not one of 'causal-lm'"),
    "misspelt auto class": (["{path}", "--auto", "causal_lm"], "Did you mean 'causal-lm'?"),
    "unfit auto class": (["{path}", "--auto", "masked-lm"], "has no class for 'llama'"),
    "unknown setting": (["{path}", "--optim-args", "ordr=x"], "Did you mean 'order'?"),
    "pattern without match": (["{path}", "--optim-args", "muon_params=lm_hed"], "lm_head"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_one_sentence(folder, case):
    arguments, message = ERRORS[case]
    path = folder()
    result = run(*(a.format(path=path) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a readable JSON file"),
        ("[1]", "a JSON object is expected"),
        ('{"model_type": "no_such_type"}', "gives no model config"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "llama|config"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "config"),
    ],
)
def test_a_broken_config_is_one_sentence(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    result = run(tmp_path)
    assert result.exit_code == 2, result.output
    assert any(part in result.stderr for part in message.split("|")), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_folder_without_config_and_code_of_a_repositorys_own_are_refused(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no config.json" in run(empty).stderr
    own_code = folder(model_type="own", auto_map={"AutoConfig": "own.Config"})
    (own_code / "own.py").write_text("raise SystemExit('this must not run')")
    result = run(own_code)
    assert result.exit_code == 2
    assert "must not run" not in result.output


def test_the_command_line_has_room_for_more_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "route" in result.output
