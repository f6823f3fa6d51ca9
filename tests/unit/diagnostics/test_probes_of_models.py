"""Probes of real models: which matrices, which gradients, and a run that is as without them."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_muon import create_muon_optimizer
from hf_muon import diagnostics as d
from hf_muon.diagnostics.gradients import muon_matrices, read_gradients


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def text(count, seed=0):
    """Batches of sequences in which the next token follows from the last."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(64, (count, 4, 1), generator=generator)
    for ids in (starts + 3 * torch.arange(16)) % 64:
        yield {"input_ids": ids, "labels": ids}


def test_a_model_of_transformers_is_probed_by_layer(llama):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    llama(**next(text(1))).loss.backward()
    kept = {name: p.grad for name, p in llama.named_parameters()}
    copies = {name: g.clone() for name, g in kept.items()}
    report = d.stationary_probe(llama, text(16), layers=["q_proj", r"layers\.1\.mlp\.up"], flips=4)
    layers = list(dict.fromkeys(reading.layer for reading in report.readings))
    assert layers == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert report.readings[-1].shape == (48, 32)
    for name, p in llama.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is kept[name]
        assert torch.equal(p.grad, copies[name])


def test_every_matrix_that_muon_trains_is_probed_by_default(llama):
    names = set(muon_matrices(llama))
    assert len(names) == 14  # seven in each of two layers; neither embedding nor head
    assert {r.layer for r in d.stationary_probe(llama, text(4), flips=2).readings} == names


def test_matrices_inside_a_parameter_are_probed_one_by_one():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 9))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

    batches = list(torch.randn(8, 2, 6, 9))
    report = d.stationary_probe(
        Model(),
        batches,
        loss=lambda model, batch: (model.experts.gate_up_proj * batch).sum(),
        orders=("polar_only",),
        flips=2,
    )
    assert [r.layer for r in report.readings] == [
        "experts.gate_up_proj[0]",
        "experts.gate_up_proj[1]",
    ]
    for index, reading in enumerate(report.readings):
        steps = torch.stack(batches)[:, index]
        update = d.replay(steps[:4], "polar_only")[-1]
        expected = d.signal_alignment(update, steps[4:].mean(0)).item()
        assert reading.statistics["alignment"].value == pytest.approx(expected, rel=1e-4)


def test_a_trajectory_probe_slides_over_training(llama):
    optimizer = create_muon_optimizer(llama, lr=0.01, polar_method="svd")
    trajectory = d.TrajectoryProbe(llama, window=4, held_out=2, layers="layers.0.mlp.down")
    recorded = []
    for step, batch in enumerate(text(8)):
        llama(**batch).loss.backward()
        trajectory.record()
        recorded.append(llama.model.layers[0].mlp.down_proj.weight.grad.clone())
        assert trajectory.is_full == (step >= 5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the next gradient is written over this one
    reading = trajectory.report(orders=("pre_polar",), flips=4).readings[0]
    steps = torch.stack(recorded)
    update = d.replay(steps[2:6], "pre_polar")[-1]
    expected = d.signal_alignment(update, steps[6:].mean(0)).item()
    assert reading.statistics["alignment"].value == pytest.approx(expected, rel=1e-4)
    assert reading.layer == "model.layers.0.mlp.down_proj.weight"


def test_recording_does_not_change_the_training(llama):
    twin = LlamaForCausalLM(llama.config)
    twin.load_state_dict(llama.state_dict())
    trajectory = d.TrajectoryProbe(llama, window=2, held_out=2)
    for model in (llama, twin):
        optimizer = create_muon_optimizer(model, lr=0.01)
        for batch in text(4):
            model(**batch).loss.backward()
            if model is llama:
                trajectory.record()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, llama.parameters(), twin.parameters()))


def test_gradients_that_are_views_of_a_bucket_are_read_in_place():
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 2))
    bucket = torch.randn(2, 4, 6)
    model[0].weight.grad = bucket[1]
    read = read_gradients(muon_matrices(model))["0.weight"]
    assert torch.equal(read, bucket[1])
    assert read.data_ptr() != bucket[1].data_ptr()


def test_a_parameter_without_a_gradient_counts_as_zero(llama):
    llama.model.layers[0].mlp.up_proj.weight.grad = torch.ones(48, 32)
    read = read_gradients(muon_matrices(llama, "mlp.up_proj"))
    assert [gradient.sum().item() for gradient in read.values()] == [48 * 32, 0]


@pytest.mark.full
def test_the_example_of_the_documentation_prints_what_the_page_shows(capsys):
    root = Path(__file__).parents[3]
    page = (root / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    example, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.S).groups()
    exec(example, {})

    def rows(table):
        cells = [line.strip("│ ").split("│") for line in table.splitlines() if line.startswith("│")]
        return [([c.strip() for c in row[:4]], float(row[4].split()[0])) for row in cells]

    actual, shown = rows(capsys.readouterr().out), rows(printed)
    assert [labels for labels, _ in actual] == [labels for labels, _ in shown]
    # The text is a file of Python's, and training amplifies rounding.
    values = [value for _, value in actual]
    assert values == pytest.approx([value for _, value in shown], abs=0.15)
