"""The stock Trainer with ``optim="muon"``: training, schedules, resuming, reports."""

import json
import logging
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer

import hf_muon.auto  # noqa: F401
from hf_muon import Muon, create_muon_optimizer, route
from hf_muon.integrations.report import build_report, find_muon
from tests.integration.tiny import (
    TINY,
    arguments,
    largest_difference,
    tiny_data,
    tiny_llama,
    trained,
    trainer_of,
    weights,
)

# "auto" is bfloat16 on CPUs that have it, and its rounding would hide what is compared.
EXACT = {"optim_args": "polar_dtype=float32"}


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
    at_once = trained(tmp_path, **EXACT, per_device_train_batch_size=8)
    in_parts = trained(
        tmp_path, **EXACT, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    # Sums in another order; a polar factor of near-zero directions magnifies their rounding.
    assert largest_difference(weights(at_once), weights(in_parts)) < 1e-3
    other = trained(tmp_path, **EXACT, per_device_train_batch_size=2)
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


def test_clipping_acts_on_the_gradient_and_not_on_the_update(tmp_path):
    free, tight = (
        trained(tmp_path, **EXACT, max_grad_norm=norm, max_steps=1) for norm in (0.0, 1e-3)
    )
    share = 1e-3 / tight.state.log_history[0]["grad_norm"]
    optimizers = [find_muon(trainer.optimizer) for trainer in (free, tight)]
    for group_free, group_tight in zip(*(o.param_groups for o in optimizers), strict=True):
        for p, q in zip(group_free["params"], group_tight["params"], strict=True):
            whole, clipped = optimizers[0].state[p]["exp_avg"], optimizers[1].state[q]["exp_avg"]
            # float32 products; clip_grad_norm_ adds 1e-6 to the norm.
            assert torch.allclose(clipped, share * whole, rtol=1e-4, atol=1e-12)
            if group_free["algorithm"] == "muon":
                assert torch.allclose(p, q, atol=1e-5)  # O is scale-free: the step is as large


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
    "greedy": {},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_move_both_halves_together(tmp_path, schedule):
    extra = {}
    if schedule in ("reduce_lr_on_plateau", "greedy"):
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


def test_rates_that_a_resumed_run_does_not_use_are_said(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 0.01}
    trained(tmp_path, **settings)
    other = trainer_of(tmp_path, **{**settings, "learning_rate": 0.03})
    with pytest.warns(UserWarning, match=r"lr=0.01 \(not 0.03\), adamw_lr=0.01 \(not 0.03\)$"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.optimizer.param_groups[0]["initial_lr"] == 0.01
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*settings are used")
        same = trainer_of(tmp_path, **settings)
        same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_resume_with_other_routes_names_the_parameters(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, **settings)
    other = trainer_of(tmp_path, optim_args="adamw_params=down_proj", **settings)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj\.weight: Muon .*AdamW here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_an_adamw_checkpoint_says_what_to_do(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, optim="adamw_torch", **settings)
    with pytest.raises(ValueError, match=r"another optimizer.*optimizer\.pt"):
        trainer_of(tmp_path, **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_model_without_matrices_is_an_error(tmp_path):
    model = tiny_llama()
    for r in route(model).muon:
        model.get_parameter(r.name).requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing to train with Muon"):
        trained(tmp_path, model=model)


def test_tied_embeddings_train_once_with_adamw(tmp_path):
    trainer = trained(tmp_path, model=tiny_llama(tie_word_embeddings=True))
    groups = find_muon(trainer.optimizer).param_groups
    names = [name for group in groups for name in group["param_names"]]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" not in groups[0]["param_names"]
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight


def test_a_compiled_model_trains_the_same_weights(tmp_path):
    compiled = trained(tmp_path, **EXACT, torch_compile=True, torch_compile_backend="eager")
    # The traced graph adds some gradients in another order: float32 rounding.
    assert largest_difference(weights(compiled), weights(trained(tmp_path, **EXACT))) < 1e-5


def test_a_sequence_classifier(tmp_path):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=3, pad_token_id=0))
    data = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(tiny_data())]
    trainer = trained(tmp_path, model=model, data=data)
    groups = find_muon(trainer.optimizer).param_groups
    assert "score.weight" in groups[1]["param_names"]


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


def test_report_of_a_trial_goes_to_its_checkpoint(tmp_path):
    # What a hyper-parameter search does: each trial saves in a folder of its own.
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    trainer.state.trial_name = "run-0"
    trainer.create_optimizer()
    (tmp_path / "run-0" / "checkpoint-0").mkdir(parents=True)
    trainer.callback_handler.optimizer = trainer.optimizer
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    assert (tmp_path / "run-0" / "checkpoint-0" / "muon_report.json").exists()
    # A folder with nothing but a report would pass for the last checkpoint.
    trainer.state.trial_name = "run-1"
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    assert not (tmp_path / "run-1").exists()
    assert not (tmp_path / "checkpoint-0").exists()


def test_report_names_parameters_that_were_added_by_hand(tmp_path):
    optimizer = create_muon_optimizer(tiny_llama(), lr=0.1)
    assert build_report(optimizer)["not_routed"] == []
    optimizer.add_param_group({"params": [("more", torch.nn.Parameter(torch.zeros(3, 3)))]})
    assert build_report(optimizer)["not_routed"] == ["more"]


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
