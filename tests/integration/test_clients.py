"""Trainers that make groups of their own, and what the Trainer's events let us see."""

import gc
import logging
from collections import Counter
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import HPSearchBackend

import hf_muon.auto  # noqa: F401
from hf_muon import Muon, MuonConfig, MuonOptimizerFactory, create_muon_optimizer, route
from hf_muon.integrations import arguments as our_arguments
from hf_muon.integrations import factory
from hf_muon.integrations.report import find_muon
from hf_muon.routing import plan as plans
from tests.integration.tiny import (
    arguments,
    largest_difference,
    tiny_data,
    tiny_llama,
    trained,
    trainer_of,
    weights,
)


def built(kind, folder, model=None, **overrides):
    args = arguments(folder, **overrides)
    return kind(model=model or tiny_llama(), args=args, train_dataset=tiny_data())


def by_name(optimizer, *keys):
    """Parameter name -> what its group has under some keys."""
    return {
        name: tuple(group[key] for key in ("algorithm", *keys))
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


# --- groups of their own ------------------------------------------------------------------------


class LayerwiseTrainer(Trainer):
    """Rates that fall towards the input, by the call that subclasses copy from transformers."""

    knows_model = False

    def create_optimizer(self, model=None):
        given = (self.args, self.model) if self.knows_model else (self.args,)
        cls, settings = Trainer.get_optimizer_cls_and_kwargs(*given)
        named = dict(self.model.named_parameters())
        first = [p for name, p in named.items() if "layers.0" in name]
        rest = [p for name, p in named.items() if "layers.0" not in name]
        groups = [
            {"params": first, "lr": self.args.learning_rate / 10, "weight_decay": 0.0},
            {"params": rest, "weight_decay": 0.5},
        ]
        self.optimizer = cls(groups, **settings)
        return self.optimizer


class LayerwiseWithModel(LayerwiseTrainer):
    knows_model = True


@pytest.mark.parametrize("kind", [LayerwiseTrainer, LayerwiseWithModel])
def test_groups_of_a_subclass_are_split_by_the_routes(tmp_path, kind):
    trainer = built(kind, tmp_path)
    trainer.train()
    optimizer = find_muon(trainer.optimizer)
    found = by_name(optimizer, "initial_lr", "weight_decay")
    routes = {r.name: r.algorithm for r in route(tiny_llama()).routes}
    assert found == {
        name: (algorithm, 1e-3, 0.0) if "layers.0" in name else (algorithm, 1e-2, 0.5)
        for name, algorithm in routes.items()
    }
    assert optimizer.param_groups[0]["algorithm"] == "muon"
    assert optimizer.replicate_group == "world"
    assert optimizer.routes["totals"]["muon_matrices"] == 14


def test_given_groups_with_the_settings_of_the_run_change_nothing(tmp_path):
    class Stock(Trainer):
        def create_optimizer(self, model=None):
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = self.get_decay_parameter_names(self.model)
            groups = [
                {"params": [p for n, p in self.model.named_parameters() if (n in decayed) == which],
                 "weight_decay": 0.1 if which else 0.0, "lr": self.args.learning_rate}
                for which in (True, False)
            ]  # fmt: skip
            self.optimizer = cls(groups, **settings)
            return self.optimizer

    settings = {"optim_args": "adamw_lr=1e-3,adamw_weight_decay=0.2,polar_dtype=float32"}
    ours, stock = built(Stock, tmp_path, **settings), trainer_of(tmp_path, **settings)
    ours.train()
    stock.train()
    keys = ("initial_lr", "weight_decay")
    groups = [by_name(find_muon(trainer.optimizer), *keys) for trainer in (ours, stock)]
    assert groups[0] == groups[1]
    assert groups[0]["lm_head.weight"] == ("adamw", 1e-3, 0.2)
    assert largest_difference(weights(ours), weights(stock)) == 0


def test_a_rate_for_both_halves_is_refused_where_adamw_has_its_own():
    model = tiny_llama()
    groups = [{"params": model.parameters(), "lr": 0.5}]
    with pytest.raises(ValueError, match=r"lr=0\.5 of its own holds matrices and other"):
        create_muon_optimizer(model, lr=0.1, adamw_lr=0.2, groups=groups)
    matrices = [r.name for r in route(model).muon]
    apart = [
        {"params": [p for n, p in model.named_parameters() if (n in matrices) == which], "lr": lr}
        for which, lr in ((True, 0.5), (False, 0.7))
    ]
    found = by_name(create_muon_optimizer(model, lr=0.1, adamw_lr=0.2, groups=apart), "lr")
    assert set(found.values()) == {("muon", 0.5), ("adamw", 0.7)}


def test_groups_may_hold_part_of_a_model_and_parameters_alone():
    model = tiny_llama()
    layer = model.model.layers[0]
    optimizer = MuonOptimizerFactory(layer.parameters(), lr=0.1, plan=route(model))
    assert len(optimizer.routes["routes"]) == len(list(layer.parameters()))
    assert Counter(g["algorithm"] for g in optimizer.param_groups) == {"muon": 1, "adamw": 1}
    matrix = {"params": [layer.mlp.up_proj.weight], "algorithm": "muon"}
    assert isinstance(MuonOptimizerFactory([matrix], lr=0.1), Muon)


def test_parameters_of_no_known_model_are_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"Parameters alone do not say.*plan=hf_muon\.route"):
        MuonOptimizerFactory(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(128, 32\) that is not in the model"):
        MuonOptimizerFactory(model.parameters(), lr=0.1, plan=route(tiny_llama()))


def test_a_model_is_known_as_long_as_it_lives(tmp_path):
    trainer = trainer_of(tmp_path)
    assert our_arguments.model_of(trainer.model.parameters()) is trainer.model
    parameters = list(trainer.model.parameters())
    trainer.model = trainer.model_wrapped = None
    del trainer
    gc.collect()
    assert our_arguments.model_of(parameters) is None


def adapted():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "embed_tokens"])
    return peft.get_peft_model(tiny_llama(), config)


def test_pefts_lora_plus(tmp_path):
    class LoraPlus(Trainer):
        def create_optimizer(self, model=None):
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = create_loraplus_optimizer(
                self.model, cls, loraplus_lr_ratio=16, **settings
            )
            return self.optimizer

    trainer = built(LoraPlus, tmp_path, model=adapted())
    trainer.train()
    model = adapted()
    alone = create_loraplus_optimizer(
        model, MuonOptimizerFactory, lr=1e-2, loraplus_lr_ratio=16, plan=route(model)
    )
    for optimizer, lr in ((find_muon(trainer.optimizer), "initial_lr"), (alone, "lr")):
        for name, (algorithm, rate, decay) in by_name(optimizer, lr, "weight_decay").items():
            expected = 1e-6 if "embed_tokens" in name else 0.16 if "lora_B" in name else 1e-2
            assert (rate, decay) == (expected, 0.0), name
            assert algorithm == ("adamw" if "embed_tokens" in name else "muon"), name
    with pytest.raises(ValueError, match="no partner in its group"):  # A and B have two rates
        create_loraplus_optimizer(
            model, MuonOptimizerFactory, lr=1e-2, loraplus_lr_ratio=16, lora_update="product",
            plan=route(model, MuonConfig(lora_update="product")),
        )  # fmt: skip


def test_factors_of_rank_one_have_their_own_sentence():
    config = peft.LoraConfig(r=1, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"Rank-1 factors are vectors.*use r ≥ 2"):
        create_muon_optimizer(peft.get_peft_model(tiny_llama(), config), lr=0.1)


# --- once ---------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often settings are read and checked until the optimizer takes them, and models routed."""
    count = Counter()
    checked, decided, made = MuonConfig.__post_init__, plans.survey, factory.Muon

    def once(config):
        count["configs"] += "taken" not in count
        checked(config)

    def surveyed(model):
        count["surveys"] += 1
        return decided(model)

    def taken(*args, **settings):
        count["taken"] += 1
        return made(*args, **settings)

    monkeypatch.setattr(MuonConfig, "__post_init__", once)
    monkeypatch.setattr(plans, "survey", surveyed)
    monkeypatch.setattr(factory, "Muon", taken)
    return count


def test_settings_are_read_and_the_model_is_routed_once_in_a_run(tmp_path, calls):
    trained(tmp_path)
    assert calls == {"configs": 1, "surveys": 1, "taken": 1}


@pytest.mark.parametrize("what", ["arguments", "parameters"])
def test_what_changed_since_the_trainer_was_built_is_read_again(tmp_path, calls, what):
    trainer = trainer_of(tmp_path)
    if what == "arguments":
        trainer.args.learning_rate = 0.5
    else:
        trainer.model.model.layers[0].requires_grad_(False)
    optimizer = trainer.create_optimizer()
    assert calls["surveys"] == 2
    assert optimizer.param_groups[0]["lr"] == (0.5 if what == "arguments" else 1e-2)
    assert len(optimizer.param_groups[0]["params"]) == (14 if what == "arguments" else 7)


def test_no_plan_outlives_the_making_of_the_optimizer(tmp_path):
    # Under FSDP2 its parameters are the unsharded ones.
    trainer = trainer_of(tmp_path)
    assert our_arguments._prepared[trainer.model] is not None
    trainer.create_optimizer()
    assert our_arguments._prepared[trainer.model] is None


# --- what is not trained, and what begins anew --------------------------------------------------


class Unfreeze(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.lm_head.weight.requires_grad_(True)


def test_parameters_that_become_trainable_are_named(tmp_path, caplog):
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    trainer = trainer_of(tmp_path, model=model, trainer_settings={"callbacks": [Unfreeze()]})
    with caplog.at_level(logging.WARNING, logger="hf_muon"):
        trainer.train()
        assert caplog.text.count("does not train lm_head.weight:") == 1  # of four records
        caplog.clear()
        model.model.norm.weight = nn.Parameter(torch.ones(32))  # between two trainings
        trainer.train()
        assert "does not train model.norm.weight, lm_head.weight:" in caplog.text
        assert "trainer.optimizer = None" in caplog.text
        caplog.clear()
        trainer.optimizer = None
        trainer.train()
        assert "does not train" not in caplog.text


def test_flat_groups_are_compared_by_name(tmp_path, caplog):
    # What DeepSpeed leaves in them.
    trainer = trainer_of(tmp_path)
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.zeros(4))]
    trainer.callback_handler.optimizer = optimizer
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert "does not train" not in caplog.text
    trainer.model.more = nn.Linear(2, 2)
    trainer.callback_handler.on_epoch_end(trainer.args, trainer.state, trainer.control)
    assert "does not train more.weight, more.bias:" in caplog.text


class KeepSchedule(TrainerCallback):
    """The remedy of the message and of docs/troubleshooting.md."""

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        while lr_scheduler.last_epoch < state.global_step:
            lr_scheduler.step()


def test_a_schedule_that_begins_anew_is_said_and_can_be_kept(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2}
    rates = [e["learning_rate"] for e in trained(tmp_path, **settings).state.log_history[:4]]
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()

    def resumed(*callbacks):
        given = {"callbacks": list(callbacks)}
        trainer = trainer_of(tmp_path / "again", trainer_settings=given)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        return [e["learning_rate"] for e in trainer.state.log_history[:4]]

    with caplog.at_level(logging.WARNING, logger="hf_muon"):
        assert resumed() != rates
        assert "Training goes on at step 2 with a schedule that begins anew" in caplog.text
        assert "Training goes on at step 2 without the state of the optimizer" in caplog.text
        caplog.clear()
        assert resumed(KeepSchedule()) == rates
        assert "begins anew" not in caplog.text


# --- tried --------------------------------------------------------------------------------------


def test_auto_find_batch_size(tmp_path):
    class Small(Trainer):
        def training_step(self, model, inputs, *args):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory. (a batch of more than two)")
            return super().training_step(model, inputs, *args)

    trainer = built(Small, tmp_path, auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.train_batch_size == 2
    expected = trained(tmp_path, per_device_train_batch_size=2)
    assert largest_difference(weights(trainer), weights(expected)) == 0


def test_hyperparameter_search_reads_the_settings_of_each_trial(tmp_path, monkeypatch):
    # What the search does with a trial of optuna, which need not be installed.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    data = {"train_dataset": tiny_data()}
    trainer = Trainer(model_init=lambda: tiny_llama(), args=arguments(tmp_path), **data)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    for number, rate in enumerate((1e-3, 5e-3)):
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate}))
        assert find_muon(trainer.optimizer).param_groups[0]["initial_lr"] == rate


def test_target_modules_need_the_model(tmp_path):
    args = arguments(tmp_path, optim_target_modules=["lm_head"])
    with pytest.raises(ValueError, match="names modules of a model that is not known"):
        Trainer.get_optimizer_cls_and_kwargs(args)


def test_a_resnet_by_name(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 16, 16, generator=generator)
    data = [{"pixel_values": image, "labels": n % 2} for n, image in enumerate(images)]
    settings = {
        "optim_args": "conv=flatten", "max_steps": 6, "per_device_train_batch_size": 16,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip

    def built(**more):
        torch.manual_seed(0)
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        )
        model = ResNetForImageClassification(config)
        return trainer_of(tmp_path, model, data, **{**settings, **more})

    trainer = built()
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    kernels = {name for name in after if after[name].ndim == 4}
    assert all(not torch.equal(after[name], before[name]) for name in kernels)
    muon = [g for g in find_muon(trainer.optimizer).param_groups if g["algorithm"] == "muon"]
    assert {name for group in muon for name in group["param_names"]} == kernels
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    resumed = built()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(weights(resumed), after) == 0
    with pytest.raises(ValueError, match=r"Nothing to train with Muon.*conv='flatten'"):
        built(optim_args=None).train()
