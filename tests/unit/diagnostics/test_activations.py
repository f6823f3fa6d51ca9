"""The inputs of layers: the right ones, of every kind of call, and only in the steps asked for."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

import hf_muon.auto  # noqa: F401
from hf_muon import SpectralMonitor
from hf_muon import diagnostics as d
from hf_muon.diagnostics import activations
from hf_muon.diagnostics.activations import Activations
from hf_muon.diagnostics.history import read_spectra
from tests.integration.tiny import tiny_data, tiny_llama, trained


def measured(model, names, *batches):
    looking = Activations(model, names)
    looking.ask()
    for batch in batches:
        model(batch)
    return looking.answer()


def test_rows_of_all_calls_of_a_step_count():
    first, second = torch.randn(2, 5, 6), torch.randn(4, 6)
    layer = nn.Linear(6, 3)
    model = nn.ModuleDict({"up": layer})
    model.forward = lambda x: layer(x)
    found = measured(model, ["up.weight"], first, second)
    rows = torch.cat([first.reshape(-1, 6), second])
    assert found["up.weight"] == pytest.approx(d.stable_rank(rows.double()).item())


def test_blocks_of_a_fused_weight_share_their_input():
    model = nn.Sequential(nn.Linear(4, 9))
    found = measured(model, ["0.weight[0]", "0.weight[2]"], torch.randn(7, 4))
    assert found["0.weight[0]"] == found["0.weight[2]"]


def test_of_many_tokens_some_are_taken_evenly(monkeypatch):
    monkeypatch.setattr(activations, "MOST_TOKENS", 10)
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(50, 4)
    expected = d.stable_rank(x[::5].double()).item()
    assert measured(model, ["0.weight"], x)["0.weight"] == pytest.approx(expected)
    # The second call finds no room.
    assert measured(model, ["0.weight"], x, torch.ones(50, 4))["0.weight"] == pytest.approx(
        expected
    )


def test_inputs_that_are_parts_or_not_finite_and_other_layers_are_left_out():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.weight

    model = nn.Sequential(Other(), nn.Linear(4, 4))
    assert set(measured(model, ["0.weight", "1.weight"], torch.randn(3, 4))) == {"1.weight"}
    assert measured(model, ["1.weight"], torch.full((3, 4), torch.nan)) == {}
    assert measured(model, ["1.weight"]) == {}  # never called
    looking = Activations(model, ["1.weight"])
    model[1].forward = lambda x: x
    looking.ask()
    model[1](torch.randn(3, 2))
    assert looking.answer() == {}


class Inputs(TrainerCallback):
    """What goes into a layer in every step, and how many hooks it has between steps."""

    def __init__(self, module):
        self.module, self.rows, self.hooks = module, [], []

    def on_step_begin(self, *args, **kwargs):
        self.hooks.append(len(self.module._forward_pre_hooks))
        forward = type(self.module).forward
        self.rows.append([])

        def kept(x):
            self.rows[-1].append(x.detach().double().reshape(-1, x.shape[-1]))
            return forward(self.module, x)

        self.module.forward = kept


def test_a_trainer_records_the_inputs_of_its_sampled_steps(tmp_path):
    model = tiny_llama()
    seen = Inputs(model.model.layers[1].mlp.down_proj)
    monitor = SpectralMonitor("layers.1.mlp", every=3)
    trained(
        tmp_path,
        model=model,
        max_steps=7,
        gradient_accumulation_steps=2,
        trainer_settings={"callbacks": [seen, monitor]},
    )
    found = {s["step"]: s for s in read_spectra(tmp_path) if "down_proj" in s["layer"]}
    assert set(found) == {3, 6}
    for step, sample in found.items():
        rows = torch.cat(seen.rows[step - 1])
        assert len(rows) == 2 * 4 * 16
        assert sample["input_stable_rank"] == pytest.approx(d.stable_rank(rows).item(), rel=1e-6)
        G = sample["gradient_nuclear_rank"]
        assert sample["gradient_stable_rank"] <= G
    assert seen.hooks == [0] * 7
    assert not seen.module._forward_pre_hooks


def test_adapters_have_inputs_and_layers_of_their_own_kind_have_none(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    monitor = SpectralMonitor(every=2)
    trained(tmp_path / "a", model=model, trainer_settings={"callbacks": [monitor]})
    samples = read_spectra(tmp_path / "a")
    assert samples
    assert all(s["input_stable_rank"] >= 1 - 1e-9 for s in samples)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2))
    monitor = SpectralMonitor(every=2)  # whose layers are transformers' Conv1D
    trained(tmp_path / "b", model=gpt, data=tiny_data(), trainer_settings={"callbacks": [monitor]})
    samples = read_spectra(tmp_path / "b")
    assert samples
    assert not any("input_stable_rank" in sample for sample in samples)
