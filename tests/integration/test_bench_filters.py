"""The study of filters: the search brackets, runs are kept and paired, the model is a LLaMA."""

import importlib
import math
from concurrent.futures import Future
from contextlib import nullcontext
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
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(importlib.import_module("byte_llama"), "texts", lambda corpus: (TEXT, TEXT))
    return importlib.import_module


@pytest.fixture
def run(bench):
    """A run of few steps, on this process's text."""
    return bench("byte_llama").Run({}, tokens=64, steps=4, rate=2e-3, adamw_rate=8e-3, seed=0)


# --- one training ---------------------------------------------------------------------------------


def test_the_model_is_a_llama(bench):
    llama = bench("byte_llama")
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
    factors = [bench("byte_llama").rate_factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert factors[-1] == pytest.approx(1 / 95)


def test_a_run_is_repeatable_and_its_seed_counts(bench, run):
    train = bench("byte_llama").train
    found, again, other = (train(one)["loss"] for one in (run, run, replace(run, seed=1)))
    assert found == again != other
    assert 3 < found < math.log(256)  # four steps at full rate


@pytest.mark.parametrize("noise", ["heavy", "spike"])
def test_noise_is_added_to_the_matrices_alone(bench, run, noise):
    llama = bench("byte_llama")
    matrices, others = llama.halves(llama.new_weights(0))
    for weight in (*matrices, *others):
        weight.grad = torch.ones_like(weight)
    disturb = llama.disturbance(replace(run, noise=noise, noise_scale=0.5), matrices)
    disturb(run.steps // 2)
    grown = torch.cat([matrix.grad.flatten() for matrix in matrices])
    if noise == "spike":
        assert bool((grown == 1000).all())
    else:  # |t| of 1.5 degrees of freedom has the median 0.87, and a long tail
        added = (grown - 1).abs() / 0.5
        assert added.median().item() == pytest.approx(0.87, abs=0.02)
        assert added.max() > 100
    assert all(bool((weight.grad == 1).all()) for weight in others)
    assert llama.train(replace(run, noise=noise, noise_scale=0.5)) != llama.train(run)


def test_noise_to_signal_is_that_of_the_gradients(bench):
    llama = bench("byte_llama")
    weights = llama.new_weights(0)
    matrices, _ = llama.halves(weights)
    same = np.full(llama.LENGTH + 2, 65, dtype=np.uint8)  # one sequence: no noise
    assert llama.noise_to_signal(weights, matrices, same, 1) == pytest.approx(0, abs=1e-3)
    few, many = (llama.noise_to_signal(weights, matrices, TEXT, rows) for rows in (1, 16))
    assert few > 4 * many > 0


# --- the search -----------------------------------------------------------------------------------


def test_the_search_ends_between_worse_neighbours(bench):
    search = bench("filter_search")
    losses = {}
    while rates := search.next_rates(losses, 1.0):
        losses |= {rate: (math.log2(rate) - 3.2) ** 2 for rate in rates}
    assert search.best_rate(losses) == 8.0
    assert sorted(losses) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert search.next_rates({1.0: math.inf, 2.0: math.inf}, 1.0) == [0.5]
    assert search.next_rates({0.0: 3.0}, 0.0) == []  # the control: matrices at rest


def test_a_search_without_a_best_rate_ends(bench, run, tmp_path):
    search = bench("filter_search")
    runs, plan = search.Runs(tmp_path / "runs.jsonl"), search.Plan("falls", run, 1.0, (1, 2))
    while missing := plan.missing(runs):
        for one in missing:
            assert one.seed == 0
            runs.add("falls", one, {"loss": -one.rate})
    assert search.MOST_RATES <= len(runs.rates(plan)) < search.MOST_RATES + 2
    [row] = bench("filter_report").rows(search.read(runs.path), ["falls"])
    assert bench("filter_report").rate_text(row).endswith("at the edge)")


@pytest.fixture
def trained(bench, monkeypatch):
    """Trainings that are counted and take no time: the best rate is 4e-3."""
    search, calls = bench("filter_search"), []

    def train(one):
        calls.append(one)
        loss = 2 + abs(math.log2(one.rate / 4e-3)) + one.seed / 100 if one.rate else 5.0
        better = 0.001 * one.seed if one.settings and "nesterov" in one.settings else 0.0
        return {"loss": loss - better, "seconds": 1.0, "nsr": {"0.5": 9.0}, "state_bytes": 4.0}

    class Here:
        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(search, "train", train)
    monkeypatch.setattr(search, "workers", lambda count: nullcontext(Here()))
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
    assert len([*bench("filter_search").read(out)]) == 14
    few = [line for line in bench("filter_search").read(out) if line["seed"] < 3]
    filters = bench("filters")
    assert "fewer than 3 pairs" in filters.report(few, filters.ARMS, filters.REFERENCE)
    capsys.readouterr()
    main(["report", "--out", str(out)])
    table = capsys.readouterr().out.splitlines()[2:]
    assert table[2].startswith("| default | 0.004 (of 4) | 2.0200 ± 0.0100 (3) | – |")
    # Better by 1, 2 and 3 thousandths: 0.002 ± 0.001/√3.
    assert "| plain | 0.004 (of 4) | 2.0180 ± 0.0090 (3) | -0.0020 ± 0.0006 | better |" in table[3]


def test_noise_is_searched_anew_and_compared_with_the_clean_runs(bench, trained, tmp_path, capsys):
    main, out = bench("filters").main, tmp_path / "runs.jsonl"
    command = ["run", "--out", str(out), "--cells", "128x512", "--arms", "default"]
    main(command)
    main([*command, "--noise", "heavy", "--noise-scale", "2"])
    assert {(one.noise, one.noise_scale) for one in trained} == {("none", 0.0), ("heavy", 2.0)}
    assert len(trained) == 2 * (4 + 3)
    capsys.readouterr()
    main(["report", "--out", str(out), "--noise", "heavy"])
    *_, clean, noisy = capsys.readouterr().out.splitlines()
    assert clean.startswith("| default | none | ")
    assert noisy.startswith("| default | heavy × 2 | ")
    assert noisy.endswith("| +0.0000 ± 0.0000 |")


def test_verdicts_need_two_standard_errors(bench):
    report = bench("filter_report")
    assert [report.verdict(d, 0.01) for d in (-0.03, 0.03, 0.02, -0.02)] == [
        "better", "worse", "not told apart", "not told apart",
    ]  # fmt: skip
    assert report.paired({1: 2.0, 2: math.inf}, {1: 2.0, 2: 2.0}) is None
    assert report.loss_text({1: 2.0, 2: math.inf}) == "1 of 2 diverge"


def test_settings_that_there_are_not_raise_before_anything_is_trained(bench, trained, tmp_path):
    filters = bench("filters")
    filters.ARMS["unknown"] = filters.Arm({"no_such_setting": 1})
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
    arm = filters.Arm({"momentum_start": 0.8, "momentum_warmup_steps": filters.Share(0.25)})
    assert filters.resolved(arm, 512) == {"momentum_start": 0.8, "momentum_warmup_steps": 128}


# --- the figure -----------------------------------------------------------------------------------


def test_the_figure_is_drawn(bench, tmp_path):
    bench("filter_figure").main([str(tmp_path / "images" / "filters.png")])
    image = (tmp_path / "images" / "filters.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) < 100_000
