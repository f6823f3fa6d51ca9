"""The stock Trainer with each filter, map, rescaling and write rule, chosen by name."""

import json
import math

import pytest
import torch

import hf_muon.auto  # noqa: F401
from hf_muon import Muon, create_muon_optimizer
from hf_muon.integrations.report import build_report, describe, find_muon
from tests.integration.tiny import tiny_llama, trained

STEPS = 3
Q = "model.layers.0.self_attn.q_proj.weight"
ENTRIES, ROWS, NUMBERS = (32, 32), (1, 32), (1, 1)
SIZES = (1, 32, 1)  # of blocks of 2048 entries
EMA, TWO = {"exp_avg": ENTRIES}, {"exp_avg": ENTRIES, "exp_avg_sq": ENTRIES}
KERNEL = "momentum=0.9:0.98,momentum_weights=0.44:0.56"
FIVE = {**TWO, "exp_avg_3": ENTRIES, "exp_avg_4": ENTRIES, "exp_avg_5": ENTRIES}
COOLDOWN = "momentum_end=0.85,momentum_cooldown_start=1,momentum_cooldown_steps=2"
# optim, optim_args -> what is kept of a matrix, and what the report says.
CASES = {
    "normuon": ("normuon", "", {**EMA, "row_avg_sq": ROWS}, "rescale=rows (rescale_beta 0.95)"),
    "adamuon": ("adamuon", "", TWO, "rescale=entries (rescale_beta 0.95)"),
    "β₂": ("normuon", "rescale_beta=0.9", {**EMA, "row_avg_sq": ROWS}, "(rescale_beta 0.9)"),
    "two terms": (
        "muon", KERNEL, TWO,
        "momentum betas=0.9:0.98 with weights 0.44:0.56 (mean age 31.4 steps, Nesterov)",
    ),
    "three terms": (
        "muon", "momentum=0.8:0.9:0.95,nesterov=false", {**TWO, "exp_avg_3": ENTRIES},
        "momentum betas=0.8:0.9:0.95 with weights 0.3333:0.3333:0.3333 (mean age 10.67 steps)",
    ),
    "two terms, entries": (
        "adamuon", KERNEL, {**TWO, "exp_avg_2": ENTRIES}, "rescale=entries",
    ),
    "auto": (
        "muon", "momentum=auto", {**FIVE, "momentum_scores": (1, 17)},
        "momentum=auto (of each matrix one of 0.8, 0.9, 0.95, 0.98, 0.99, Nesterov)",
    ),
    "cooldown": (
        "muon", f"{COOLDOWN},momentum_schedule=cosine", EMA,
        "Nesterov), to 0.85 over 2 steps from step 1 on (cosine)",
    ),
    "warmup": (
        "muon", "momentum_start=0.5,momentum_warmup_steps=2", EMA,
        "Nesterov), from 0.5 over 2 steps (linear)",
    ),
    "clip": (
        "muon", "prefilter=clip,prefilter_threshold=2.5", {**EMA, "median": NUMBERS},
        "prefilter=clip (prefilter_threshold 2.5)",
    ),
    "norm": ("muon", "prefilter=norm", EMA, "prefilter=norm"),
    "polargrad": ("muon", "matrix_map=polargrad", EMA, "matrix_map=polargrad"),
    "soft": ("muon", "matrix_map=soft,map_power=0.25", EMA, "matrix_map=soft (map_power 0.25)"),
    "frobenius": ("muon", "rescale=frobenius", EMA, "rescale=frobenius"),
    "hyperball": (
        "muon", "step_rule=hyperball,weight_decay=0,adamw_lr=1e-2,adamw_weight_decay=0.1",
        {**EMA, "radius": NUMBERS}, "step_rule=hyperball",
    ),
    "relative": ("muon", "step_rule=relative,adamw_lr=1e-2", EMA, "step_rule=relative"),
    "int8": (
        "muon", "momentum_dtype=int8", {**EMA, "exp_avg_scale": SIZES}, "momentum_dtype=int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trains_keeps_and_says_what_was_asked_for(case, tmp_path):
    optim, optim_args, kept, said = CASES[case]
    start = tiny_llama().state_dict()[Q]
    trainer = trained(tmp_path, optim=optim, optim_args=optim_args, max_steps=STEPS)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    weight = dict(trainer.model.named_parameters())[Q]
    assert weight.isfinite().all()
    assert not torch.equal(weight, start)

    state = find_muon(trainer.optimizer).state[weight]
    assert {name: tuple(one.shape) for name, one in state.items() if name != "step"} == kept
    assert state["step"] == STEPS
    assert state["exp_avg"].dtype == (torch.int8 if case == "int8" else torch.float32)
    assert all(bool(state[name].any()) for name in kept)

    report = json.loads((tmp_path / "muon_report.json").read_text())
    assert said in report["optimizer"]
    group = report["groups"][0]
    for pair in filter(None, optim_args.split(",")):
        name, value = pair.split("=")
        if name in group and name != "weight_decay":
            assert written(group[name]) == value, name


def written(value):
    """A setting as ``optim_args`` has it."""
    if isinstance(value, list):
        return ":".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def test_a_preset_is_a_default_that_optim_args_may_change(tmp_path):
    trainer = trained(tmp_path, optim="normuon", optim_args="rescale=none", max_steps=1)
    plain = trained(tmp_path, optim="muon", max_steps=1)
    ours, same = (dict(one.model.named_parameters())[Q] for one in (trainer, plain))
    assert torch.equal(ours, same)


def test_the_model_card_names_the_rule(tmp_path):
    trainer = trained(tmp_path, optim="adamuon", optim_args=KERNEL, max_steps=1)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "rescale=entries (rescale_beta 0.95), momentum betas=0.9:0.98" in card


def test_a_write_without_a_factor_or_decay_is_described_without():
    build = create_muon_optimizer
    relative = describe(build(tiny_llama(), lr=0.01, step_rule="relative"))
    assert "adjust_lr" not in relative
    assert "weight_decay=0," in relative
    hyperball = describe(build(tiny_llama(), lr=0.01, step_rule="hyperball"))
    assert "adjust_lr" not in hyperball
    assert "weight_decay" not in hyperball
    soft = describe(build(tiny_llama(), lr=0.01, matrix_map="soft", map_power=0.5))
    assert "polar_method" not in soft
    assert "momentum" not in describe(build(tiny_llama(), lr=0.01, order="polar_only"))


def test_beta_by_parameter_is_reported():
    weights = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    optimizer = Muon([{"params": weights, "momenta": (0.5, 0.9)}], lr=0.1)
    assert "momentum beta from 0.5 to 0.9, by parameter (Nesterov)" in describe(optimizer)
    assert build_report(optimizer)["groups"][0]["momenta"] == [0.5, 0.9]
