"""The stock Trainer with ``optim="muon"``: training, schedules, resuming, reports."""

import json
import logging

import pytest
import torch
from transformers import Trainer

import hf_muon.auto  # noqa: F401
from hf_muon import Muon, route
from hf_muon.integrations.report import find_muon
from tests.integration.tiny import (
    arguments,
    largest_difference,
    tiny_data,
    tiny_llama,
    trained,
    trainer_of,
    weights,
)


def test_the_optimizer_is_ours_and_routes_the_model(tmp_path):
    trainer = trained(tmp_path)
    optimizer = find_muon(trainer.optimizer)
    assert isinstance(optimizer, Muon)
    assert len(optimizer.param_groups[0]["params"]) == 14
    adamw = [name for group in optimizer.param_groups[1:] for name in group["param_names"]]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(adamw)


def test_every_parameter_moves(tmp_path):
    start = {name: p.detach().clone() for name, p in tiny_llama().named_parameters()}
    end = weights(trained(tmp_path))
    assert all(not torch.equal(start[name], end[name]) for name in start)


def test_the_adamw_half_equals_a_stock_run(tmp_path):
    # Muon at rate 0 leaves the matrices alone; the stock run has them frozen. Clipping is off,
    # because its norm covers all gradients.
    ours = trained(
        tmp_path, learning_rate=0.0, optim_args="adamw_lr=1e-2", max_grad_norm=0.0, max_steps=6
    )
    model = tiny_llama()
    matrices = {r.name for r in route(model).muon}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in matrices)
    stock = trained(
        tmp_path, model=model, optim="adamw_torch_fused", max_grad_norm=0.0, max_steps=6
    )
    assert largest_difference(weights(ours), weights(stock)) == 0
    start = {name: p.detach() for name, p in tiny_llama().named_parameters()}
    assert largest_difference(weights(ours), start) > 0.01


def test_decay_split_is_the_trainers(tmp_path):
    trainer = trained(tmp_path)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    for group in find_muon(trainer.optimizer).param_groups:
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0)


def test_gradient_accumulation_equals_the_larger_batch(tmp_path):
    at_once = trained(tmp_path, per_device_train_batch_size=8)
    in_parts = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    # Sums in another order; a polar factor of near-zero directions magnifies their rounding.
    assert largest_difference(weights(at_once), weights(in_parts)) < 1e-3
    other = trained(tmp_path, per_device_train_batch_size=2)
    assert largest_difference(weights(at_once), weights(other)) > 1e-2


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    plain, recomputed = (trained(tmp_path, activation_checkpointing=on) for on in (False, True))
    # The recomputed activations are the same numbers.
    assert largest_difference(weights(plain), weights(recomputed)) < 1e-6


def test_bf16_autocast(tmp_path):
    trainer = trained(tmp_path, bf16=True)
    full = trained(tmp_path)
    difference = largest_difference(weights(trainer), weights(full))
    assert 0 < difference < 0.1  # four steps of RMS 0.2 · 0.01
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_pure_bfloat16_weights(tmp_path):
    trainer = trained(tmp_path, model=tiny_llama().bfloat16(), optim_args="momentum_dtype=float32")
    optimizer = find_muon(trainer.optimizer)
    weight = optimizer.param_groups[0]["params"][0]
    assert weight.dtype == torch.bfloat16
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32


def test_clipping_acts_on_the_gradient(tmp_path):
    # O is scale-free, so a norm clipped a thousand times smaller moves the matrices as far.
    loose, tight = (trained(tmp_path, max_grad_norm=norm, max_steps=1) for norm in (1e3, 1e-3))
    a, b = weights(loose), weights(tight)
    for r in route(loose.model).muon:
        assert torch.allclose(a[r.name], b[r.name], atol=1e-5)  # float32 rounding of the gradient
    assert tight.state.log_history[0]["grad_norm"] == loose.state.log_history[0]["grad_norm"]


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {},
    "polynomial": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_move_both_halves_together(tmp_path, schedule):
    extra = {}
    if schedule == "reduce_lr_on_plateau":
        extra = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    trainer = trainer_of(
        tmp_path,
        optim_args="adamw_lr=1e-3",
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=SCHEDULES[schedule] or None,
        warmup_steps=2,
        trainer_settings={"eval_dataset": tiny_data(4)},
        **extra,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert entry["adamw/lr"] == pytest.approx(0.1 * entry["learning_rate"])


@pytest.mark.parametrize(
    "optim_args",
    [
        "order=pre_polar",
        "order=post_polar,match_update_rms=true",
        "order=polar_only",
        "momentum_start=0.5,momentum_warmup_steps=5",
    ],
)
def test_resume_is_bitwise(tmp_path, optim_args):
    settings = {"optim_args": optim_args, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    uninterrupted = trained(tmp_path, **settings)
    resumed = trainer_of(tmp_path, model=tiny_llama(seed=1), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert largest_difference(weights(uninterrupted), weights(resumed)) == 0
    # Control: without the optimizer's state the same checkpoint ends elsewhere.
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    fresh = trainer_of(tmp_path, model=tiny_llama(seed=1), **settings)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(weights(uninterrupted), weights(fresh)) > 1e-4


def test_resume_with_other_routes_names_the_parameters(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, **settings)
    other = trainer_of(tmp_path, optim_args="adamw_params=down_proj", **settings)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight: muon .*adamw here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_model_without_matrices_is_an_error(tmp_path):
    model = tiny_llama()
    for r in route(model).muon:
        model.get_parameter(r.name).requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing to train with Muon"):
        trained(tmp_path, model=model)


def test_model_init(tmp_path):
    trainer = Trainer(
        model_init=lambda: tiny_llama(), args=arguments(tmp_path), train_dataset=tiny_data()
    )
    trainer.train()
    assert find_muon(trainer.optimizer) is not None


# --- reports ------------------------------------------------------------------------------------


def test_report_is_written_to_checkpoints_and_output_folder(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=2, optim_args="momentum=0.9")
    reports = [
        json.loads((folder / "muon_report.json").read_text())
        for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4")
    ]
    for report in reports:
        assert report["routing"]["fingerprint"] == route(tiny_llama()).fingerprint
        assert report["groups"][0]["momentum"] == 0.9
        assert report["groups"][0]["initial_lr"] == 1e-2
        assert report["versions"]["torch"]
        reasons = {r["name"]: r["reason"] for r in report["routing"]["routes"]}
        assert "head" in reasons["lm_head.weight"]


def test_model_card_names_optimizer_order_beta_and_window(tmp_path):
    trainer = trained(tmp_path, optim_args="order=post_polar,momentum=0.9")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "order=post_polar, momentum beta=0.9 (window T=1/(1-beta)=10 steps" in card
    assert "AdamW with betas=(0.9, 0.999)" in card


def test_other_optimizers_are_left_alone(tmp_path):
    trainer = trained(tmp_path, optim="adamw_torch")
    assert find_muon(trainer.optimizer) is None
    assert not (tmp_path / "muon_report.json").exists()
    assert all("adamw/lr" not in entry for entry in trainer.state.log_history)
    trainer.create_model_card()
    assert "Muon" not in (tmp_path / "README.md").read_text()


def test_an_optimizer_given_to_the_trainer_wins_with_a_warning(tmp_path, caplog):
    model = tiny_llama()
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_of(tmp_path, model=model, trainer_settings={"optimizers": (given, None)})
    with caplog.at_level(logging.WARNING, logger="hf_muon"):
        trainer.train()
    assert "optim='muon' was asked for" in caplog.text
    assert not (tmp_path / "muon_report.json").exists()
