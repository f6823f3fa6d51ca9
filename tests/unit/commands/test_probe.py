"""``hf-muon probe`` takes gradients of a model on a text and prints what its updates hold."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_muon.commands.cli import app
from hf_muon.commands.probe import read_blocks
from hf_muon.diagnostics import stationary_probe
from tests.integration.tiny import tiny_llama

SMALL = ("--batches", 6, "--batch-size", 2, "--seq-len", 16)
MATRIX = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaMA whose tokens are characters, and text for it."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=64).save_pretrained(path)
    characters = {character: index for index, character in enumerate("abcdefghijklmnop \n")}
    words = Tokenizer(models.WordLevel(characters, unk_token=" "))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    (path / "text.txt").write_text("abcabd efgefh ijkijl mnomnp\n" * 20)
    return path


def run(folder, *arguments):
    options = ["--text", folder / "text.txt", *arguments]
    return CliRunner().invoke(app, ["probe", str(folder), *map(str, options)])


def readings(folder, *arguments):
    result = run(folder, *SMALL, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["readings"]


def test_readings_are_those_of_the_stationary_probe(folder):
    found = readings(folder, "--layers", "1.mlp.down", "--momentum", 0.9)
    blocks = torch.tensor(read_blocks(str(folder), [folder / "text.txt"], 12, 16, 0))
    expected = stationary_probe(
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        [{"input_ids": ids, "labels": ids} for ids in blocks.split(2)],
        layers="1.mlp.down",
        momenta=(0.9,),
    )
    assert found == expected.to_dict()["readings"]
    other = readings(folder, "--layers", "1.mlp.down", "--momentum", 0.9, "--seed", 1)
    assert found[0]["statistics"] != other[0]["statistics"]


def test_the_table_has_a_line_for_each_matrix_and_order(folder):
    result = run(folder, *SMALL, "--layers", "layers.1.mlp", "--order", "pre_polar")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 3  # gate, up and down
    assert MATRIX in rows[-1]
    assert "pre_polar" in rows[-1]


def test_by_default_eight_matrices_and_all_orders_are_probed(folder):
    found = readings(folder)
    assert len({one["layer"] for one in found}) == 8  # of 14
    assert {one["order"] for one in found} == {"pre_polar", "post_polar", "polar_only"}
    assert {one["proxy"] for one in found} == {"held_out"}
    both = readings(folder, "--layers", "1.mlp.down", "--proxy", "both", "--rank", "2")
    assert {one["proxy"] for one in both} == {"held_out", "in_buffer"}


def test_no_sequence_comes_twice(folder):
    file = folder / "text.txt"
    blocks = read_blocks(str(folder), [file, file], 70, 16, 0)  # of 2 × 560 characters
    assert sorted(map(len, blocks)) == [16] * 70
    inside = [token for block in blocks for token in block]
    whole = [token for block in read_blocks(str(folder), [file], 35, 16, 0) for token in block]
    assert sorted(inside) == sorted(2 * whole)
    with pytest.raises(ValueError, match=r"1,120 tokens, 70 sequences of 16.*71 different"):
        read_blocks(str(folder), [file, file], 71, 16, 0)


ERRORS = {
    "no such text": (["--text", "nowhere.txt"], "'nowhere.txt' cannot be read"),
    "short text": (["--batches", "999"], "different ones are needed"),
    "long sequences": (
        ["--batches", "4", "--batch-size", "1", "--seq-len", "65"],
        "takes at most 64 tokens",
    ),
    "unknown order": ([*SMALL, "--order", "pre"], "order='pre'"),
    "momentum out of range": ([*SMALL, "--momentum", "1.5"], "momentum=1.5"),
    "unknown proxy": ([*SMALL, "--proxy", "buffer"], "'held_out', 'in_buffer', 'both'"),
    "no such matrix": ([*SMALL, "--layers", "q_porj"], "Did you mean 'q_proj'?"),
    "no regular expression": ([*SMALL, "--layers", "q_proj("], "not a regular expression"),
    "a pattern without end": ([*SMALL, "--layers", "(a+)+$"], "may take forever"),
    "no such device": ([*SMALL, "--device", "cup"], "device='cup' cannot be used"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_one_sentence(folder, case):
    arguments, message = ERRORS[case]
    result = run(folder, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("model", "message"),
    [("./nowhere", "does not exist"), ("no-such/model-anywhere", "gives no tokenizer")],
)
def test_models_that_are_not_there_are_named(folder, model, message):
    options = ["--text", str(folder / "text.txt")]
    result = CliRunner().invoke(app, ["probe", model, *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_other_kinds_of_models_are_referred_to_python(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config |= {"model_type": "vit", "architectures": ["ViTModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(
        app, ["probe", str(tmp_path), "--text", str(folder / "text.txt"), *map(str, SMALL)]
    )
    assert result.exit_code == 2
    assert "stationary_probe takes any loss" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"base_model_name_or_path": null}', "names no base model (base_model_name_or_path)"),
        ("{}", "names no base model (base_model_name_or_path)"),
        ("[", "is not a readable JSON file"),
        ("[]", "a JSON object is expected"),
    ],
)
def test_the_hub_is_not_asked_for_a_base_that_an_adapter_does_not_name(
    folder, tmp_path, monkeypatch, content, message
):
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text(content)
    asked = []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *name, **_: asked.append(name)
    )
    result = CliRunner().invoke(
        app, ["probe", str(tmp_path), "--text", str(folder / "text.txt"), *map(str, SMALL)]
    )
    assert result.exit_code == 2
    assert message in result.stderr
    assert not asked
