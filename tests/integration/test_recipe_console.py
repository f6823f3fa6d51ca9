"""What recipes say while they run and at their end, and what they measure of energy."""

import sys
import types
from pathlib import Path

import datasets
import pytest
import torch

from tests.integration.recipes import RECIPES, import_recipe

sys.path.append(str(RECIPES))  # for recipes/shared
from shared import progress
from shared.energy import EnergyMeter

sampling = import_recipe("llama_pretrain")["sample"]
examples = import_recipe("lora_finetune")["examples"]


def processor(folder, name, counter, most=1000):
    path = folder / name
    path.mkdir(parents=True)
    (path / "energy_uj").write_text(f"{counter}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


def test_energy_is_that_of_all_processors_over_the_end_of_a_counter(tmp_path):
    one = processor(tmp_path, "intel-rapl:0", 100, most=10**9)
    other = processor(tmp_path, "intel-rapl:1", 10**9 - 10, most=10**9)
    processor(tmp_path, "intel-rapl:0:1", 5)  # a part of the first
    meter = EnergyMeter(tmp_path)
    meter.start()
    (one / "energy_uj").write_text("2500100\n")
    (other / "energy_uj").write_text("1499990\n")  # it began anew
    meter.stop()
    assert meter.joules == 4.0
    assert meter.cpu_seconds >= 0


def test_what_cannot_be_read_is_not_estimated(tmp_path):
    (processor(tmp_path, "intel-rapl:0", 1) / "energy_uj").unlink()
    for folder in (tmp_path, tmp_path / "nowhere"):
        meter = EnergyMeter(folder)
        meter.start()
        meter.stop()
        assert meter.joules is None


STATE = types.SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9)


@pytest.mark.parametrize("patience", [0.0, 100.0])
def test_a_log_is_not_silent_for_long(monkeypatch, capsys, patience):
    monkeypatch.setattr(progress, "PATIENCE", patience)
    lines = progress.LogLines()
    lines.on_step_end(None, STATE, None)
    lines.on_prediction_step(None, STATE, None, eval_dataloader=[0] * 40)
    lines.on_evaluate(None, STATE, None)
    lines.on_prediction_step(None, STATE, None, eval_dataloader=iter([]))
    expected = ["step 3/9", "evaluated 1/40 batches", "evaluated 1 batches"]
    assert capsys.readouterr().out.splitlines() == ([] if patience else expected)


def test_a_bar_is_shown_for_long_evaluations_alone():
    bar = progress.QuietProgress()
    for count, is_shown in ((progress.LONG, False), (progress.LONG + 1, True)):
        bar.on_prediction_step(None, STATE, None, eval_dataloader=[0] * count)
        assert (bar.prediction_bar is not None) == is_shown
    bar.on_evaluate(None, STATE, None)


class Told:
    """Stands in for a Trainer: its model repeats the prompt's last token, and keeps the options."""

    is_fsdp_enabled = is_deepspeed_enabled = False

    def __init__(self):
        self.accelerator = types.SimpleNamespace(unwrap_model=lambda model: model)
        self.model = self
        self.device, self.training = torch.device("cpu"), True

    def eval(self):
        self.training = False
        return self

    def train(self, mode):
        self.training = mode

    def generate(self, input_ids, **options):
        assert not self.training
        self.drawn = torch.rand(1).item()
        return torch.cat([input_ids, input_ids[:, -1:].expand(1, 3)], dim=1)


def test_a_sample_changes_neither_the_mode_nor_the_random_numbers():
    tokenizer = types.SimpleNamespace(
        eos_token_id=0, decode=lambda ids: " ".join(map(str, ids.tolist()))
    )
    held_out = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]]})
    trainer = Told()
    before = torch.random.get_rng_state()
    first = sampling.sample(trainer, tokenizer, held_out)
    assert first == ("5 6", "6 6 6")
    assert trainer.training
    assert torch.equal(torch.random.get_rng_state(), before)
    drawn = trainer.drawn
    torch.rand(7)
    sampling.sample(trainer, tokenizer, held_out)
    assert trainer.drawn == drawn
    trainer.is_deepspeed_enabled = True
    assert sampling.sample(trainer, tokenizer, held_out) is None


def test_three_examples_have_text_prediction_and_label():
    rows = {"text": ["a", "b", "c\nd", "e"], "label": [2, 2, 0, 1]}
    scores = torch.tensor([[9.0, 1, 2], [1, 9, 2], [9, 1, 2]]).numpy()

    def predict(encoded, metric_key_prefix):
        assert encoded == ["c\nd", "e", "a"]
        return types.SimpleNamespace(predictions=scores)

    trainer = types.SimpleNamespace(predict=predict)
    found = examples.examples(
        trainer, datasets.Dataset.from_dict(rows), lambda rows: rows["text"][:]
    )
    assert found[0] == {"text": "c\nd", "prediction": "negative", "label": "negative"}
    assert [one["prediction"] for one in found] == ["negative", "neutral", "negative"]
    lines = examples.shown(found).splitlines()
    assert lines[1] == "  ✓ negative (graded negative)  c d"
    assert lines[3] == "  ✗ negative (graded positive)  a"


def test_recipes_end_with_a_sample_or_with_examples():
    for recipe, words in (
        ("llama_pretrain", "sampling.sample"),
        ("lora_finetune", "examples.shown"),
    ):
        assert words in Path(RECIPES / recipe / "run.py").read_text()
