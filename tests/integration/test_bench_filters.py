"""The study of filters: runs are searched, kept and paired, the model is a LLaMA.

The harness has tests of its own in ``test_study.py``.
"""

import importlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
NAMES = {
    "embedding": "model.embed_tokens", "head": "lm_head", "norm": "model.norm",
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip
TEXT = np.frombuffer(b"To be, or not to be, that is the question: " * 40, dtype=np.uint8)


@pytest.fixture
def bench(monkeypatch):
    for folder in (BENCH, BENCH.parents[1] / "recipes"):
        monkeypatch.syspath_prepend(str(folder))
    llama = importlib.import_module("study.byte_llama")
    monkeypatch.setattr(llama, "texts", lambda corpus: (TEXT, TEXT))
    return importlib.import_module


@pytest.fixture
def run(bench):
    """A run of few steps, on this process's text."""
    cell = {"tokens": 64, "steps": 4, "adamw_rate": 8e-3, "corpus": "shakespeare+sotu"}
    cell |= {"noise": "none", "noise_scale": 0.0}
    return bench("study.byte_llama").Run("default", cell, {"optimizer": "muon"}, {"rate": 2e-3}, 0)


def noisy(run, noise):
    """The same run with noise."""
    return replace(run, cell={**run.cell, "noise": noise, "noise_scale": 0.5})


# --- one training ---------------------------------------------------------------------------------


def test_the_model_is_a_llama(bench):
    llama = bench("study.byte_llama")
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=170, num_hidden_layers=2,
        num_attention_heads=4, rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    stock = LlamaForCausalLM(config)
    weights = llama.new_weights(0)
    named = {}
    for name, weight in weights.items():
        layer, _, short = name.rpartition(".")
        named[f"model.layers.{layer}." * bool(layer) + f"{NAMES[short]}.weight"] = weight.detach()
    stock.load_state_dict(named)
    rows = llama.drawn(TEXT, 3, np.random.default_rng(0))
    logits = stock(input_ids=rows[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(llama.loss_of(weights, rows), theirs)
    matrices, others = llama.halves(weights)
    assert len(matrices) == 14
    assert {w.dim() for w in matrices} == {2}
    assert sum(w.numel() for w in [*matrices, *others]) == sum(
        p.numel() for p in stock.parameters()
    )


def test_rates_rise_and_fall_to_zero(bench):
    factors = [bench("study.byte_llama").rate_factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert factors[-1] == pytest.approx(1 / 95)


def test_a_run_is_repeatable_and_its_seed_counts(bench, run):
    train = bench("study.byte_llama").train
    found, again, other = (train(one)["loss"] for one in (run, run, replace(run, seed=1)))
    assert found == again != other
    assert 3 < found < math.log(256)  # four steps at full rate


@pytest.mark.parametrize("noise", ["heavy", "spike"])
def test_noise_is_added_to_the_matrices_alone(bench, run, noise):
    llama = bench("study.byte_llama")
    matrices, others = llama.halves(llama.new_weights(0))
    for weight in (*matrices, *others):
        weight.grad = torch.ones_like(weight)
    disturb = llama.disturbance(noisy(run, noise), matrices)
    disturb(run.cell["steps"] // 2)
    grown = torch.cat([matrix.grad.flatten() for matrix in matrices])
    if noise == "spike":
        assert bool((grown == 1000).all())
    else:  # |t| of 1.5 degrees of freedom has the median 0.87, and a long tail
        added = (grown - 1).abs() / 0.5
        assert added.median().item() == pytest.approx(0.87, abs=0.02)
        assert added.max() > 100
    assert all(bool((weight.grad == 1).all()) for weight in others)
    assert llama.train(noisy(run, noise)) != llama.train(run)


# --- the search -----------------------------------------------------------------------------------


def test_a_search_without_a_best_rate_ends(bench, trained, tmp_path, monkeypatch, capsys):
    filters, out = bench("filters"), tmp_path / "runs.jsonl"
    monkeypatch.setattr(filters, "train", lambda one: {**FOUND, "loss": -one.point["rate"]})
    command = ["--out", str(out), "--arms", "default"]
    filters.main(["run", *command, "--cells", "128x512", "--seeds", "1"])
    losses = [line for line in bench("study.records").read(out) if line["seed"] == 0]
    assert len(losses) == filters.MOST_RATES
    capsys.readouterr()
    filters.main(["report", *command])
    assert "(of 14, at the edge)" in capsys.readouterr().out.splitlines()[-1]


FOUND = {"seconds": 1.0, "nsr": {"0.5": 9.0}, "state_bytes": 4.0}


@pytest.fixture
def trained(bench, monkeypatch):
    """Trainings that are counted and take no time: the best rate is 4e-3."""
    calls = []

    def train(one):
        calls.append(one)
        rate = one.point["rate"]
        loss = 2 + abs(math.log2(rate / 4e-3)) + one.seed / 100 if rate else 5.0
        better = 0.001 * one.seed if "nesterov" in one.settings else 0.0
        return {**FOUND, "loss": loss - better}

    monkeypatch.setattr(bench("filters"), "train", train)
    return calls


def test_what_stands_in_the_file_is_not_trained_again(bench, trained, tmp_path, capsys):
    main, out = bench("filters").main, tmp_path / "runs.jsonl"
    command = ["run", "--out", str(out), "--cells", "128x512", "--arms", "default", "plain"]
    main([*command, "--seeds", "1", "2"])
    assert len(trained) == 2 * (4 + 2)  # rates of 1, 2, 4 and 8e-3; two seeds
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # killed within a line
    main([*command, "--seeds", "1", "2", "3"])
    assert len(trained) == 12 + 1 + 2
    main([*command, "--seeds", "1", "2", "3"])
    assert len(trained) == 15
    assert len([*bench("study.records").read(out)]) == 14
    few = tmp_path / "few.jsonl"
    few.write_text("".join(x + "\n" for x in out.read_text().splitlines() if '"seed": 3' not in x))
    capsys.readouterr()
    main(["report", "--out", str(few)])
    assert "fewer than 3 pairs" in capsys.readouterr().out
    main(["report", "--out", str(out), "--figure", str(tmp_path / "f.png")])
    assert (tmp_path / "f.png").is_file()
    table = capsys.readouterr().out.splitlines()[2:]
    assert table[2].startswith("| default | 0.004 (of 4) | 2.0200 ± 0.0100 (3) | 0.0058 | – |")
    # Better by 1, 2 and 3 thousandths: 0.002 ± 0.001/√3.
    assert "| 2.0180 ± 0.0090 (3) | 0.0052 | -0.0020 ± 0.0006 | better |" in table[3]


def test_noise_is_searched_anew_and_compared_with_the_clean_runs(bench, trained, tmp_path, capsys):
    main, out = bench("filters").main, tmp_path / "runs.jsonl"
    command = ["run", "--out", str(out), "--cells", "128x512", "--arms", "default"]
    main(command)
    main([*command, "--noise", "heavy", "--noise-scale", "2"])
    assert {(one.cell["noise"], one.cell["noise_scale"]) for one in trained} == {
        ("none", 0.0),
        ("heavy", 2.0),
    }
    assert len(trained) == 2 * (4 + 3)
    capsys.readouterr()
    main(["report", "--out", str(out), "--noise", "heavy"])
    *_, clean, noisy = capsys.readouterr().out.splitlines()
    assert clean.startswith("| default | none | ")
    assert noisy.startswith("| default | heavy × 2 | ")
    assert noisy.endswith("| +0.0000 ± 0.0000 |")


def test_settings_that_there_are_not_raise_before_anything_is_trained(bench, trained, tmp_path):
    filters = bench("filters")
    filters.ARMS["unknown"] = filters.muon(no_such_setting=1)
    try:
        with pytest.raises(ValueError, match="no_such_setting"):
            filters.main(["run", "--out", str(tmp_path / "x"), "--arms", "default", "unknown"])
    finally:
        del filters.ARMS["unknown"]
    assert trained == []
    with pytest.raises(SystemExit, match="the search has seen seed 0"):
        filters.main(["run", "--out", str(tmp_path / "x"), "--arms", "default", "--seeds", "0"])
    for cell in ("100x512", "128", "128x"):
        with pytest.raises(SystemExit, match=f"--cells {cell}"):
            filters.main(["run", "--out", str(tmp_path / "x"), "--cells", cell])


def test_shares_of_the_run_become_steps(bench):
    filters = bench("filters")
    arm = filters.muon(momentum_start=0.8, momentum_warmup_steps=filters.Share(0.25))
    found = filters.resolved(arm, 512).settings
    assert found == arm.settings | {"momentum_start": 0.8, "momentum_warmup_steps": 128}


# --- the figure -----------------------------------------------------------------------------------


def test_the_figure_is_drawn(bench, tmp_path):
    bench("filter_figure").main([str(tmp_path / "images" / "filters.png")])
    image = (tmp_path / "images" / "filters.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) < 100_000
