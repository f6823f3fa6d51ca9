"""The Trainer's own turns and the wrappers around models: names, state and rates stay right."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

import hf_muon.auto  # noqa: F401
from hf_muon import Muon, MuonConfig, create_muon_optimizer, route
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

# --- the Trainer's turns ------------------------------------------------------------------------


def counts(trainer):
    optimizer = find_muon(trainer.optimizer)
    return {int(optimizer.state[p]["step"]) for p in trainer.model.parameters()}


def test_a_second_training_goes_on_with_the_momentum_and_a_new_schedule(tmp_path):
    trainer = trained(tmp_path)
    optimizer, rates = find_muon(trainer.optimizer), logged(trainer)
    trainer.train()
    assert find_muon(trainer.optimizer) is optimizer
    assert counts(trainer) == {8}
    assert logged(trainer) == rates
    trainer.optimizer = None
    trainer.train()
    assert counts(trainer) == {4}


def logged(trainer):
    return [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]


def test_the_best_model_is_loaded_and_trained_further(tmp_path):
    settings = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the first one, so that what is loaded is not what was trained
    }  # fmt: skip
    data = {"eval_dataset": tiny_data(4)}
    trainer = trained(tmp_path, trainer_settings=data, max_steps=4, **settings)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    half = trained(tmp_path / "half", max_steps=4)
    best, last = weights(trainer), weights(half)
    assert largest_difference(best, last) > 1e-4
    held = {id(p) for g in find_muon(trainer.optimizer).param_groups for p in g["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    trainer.train()
    assert largest_difference(weights(trainer), best) > 1e-4
    assert counts(trainer) == {8}


def test_a_search_may_try_settings_of_the_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    data = {"train_dataset": tiny_data()}
    args = arguments(tmp_path, optim_args="order=pre_polar", max_steps=1)
    trainer = Trainer(model_init=lambda: tiny_llama(), args=args, **data)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    for number, text in enumerate(("momentum=0.9", "lr_multipliers=layers:0.5,momentum=0.8")):
        trainer.train(trial=SimpleNamespace(number=number, params={"optim_args": text}))
        groups = find_muon(trainer.optimizer).param_groups
        assert groups[0]["momentum"] == (0.9, 0.8)[number]
        assert groups[0]["initial_lr"] == (1e-2, 5e-3)[number]


class Average(TrainerCallback):
    """An exponential moving average of the weights, as torch's page on SWA writes it."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.by_hand = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        old = self.by_hand or now
        self.by_hand = {name: 0.5 * old[name] + 0.5 * now[name] for name in now}


def test_averages_of_weights_do_not_touch_the_run(tmp_path):
    average = Average()
    trainer = trained(tmp_path, trainer_settings={"callbacks": [average]})
    assert largest_difference(weights(trainer), weights(trained(tmp_path / "alone"))) == 0
    found = dict(average.average.module.named_parameters())
    # The same mean in one order or another: a rounding of entries below one.
    assert largest_difference(found, average.by_hand) < 1e-6
    assert largest_difference(found, weights(trainer)) > 1e-4


def train(model, optimizer, schedule=None, steps=1):
    for row in tiny_data(steps):
        ids = row["input_ids"][None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def test_rates_of_stochastic_weight_averaging(tmp_path):
    def built():
        model = tiny_llama()
        settings = {"lr": 1e-2, "adamw_lr": 1e-3, "lr_multipliers": ("embed:0.5",)}
        optimizer = create_muon_optimizer(model, **settings)
        slow = [group["lr"] / 2 for group in optimizer.param_groups]
        return model, optimizer, SWALR(optimizer, swa_lr=slow, anneal_epochs=2), slow

    model, optimizer, schedule, slow = built()
    train(model, optimizer, schedule, 3)
    assert [group["lr"] for group in optimizer.param_groups] == slow
    torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "saved.pt")
    again, other, schedule_again, _ = built()
    again.load_state_dict(model.state_dict())
    of_optimizer, of_schedule = torch.load(tmp_path / "saved.pt")
    other.load_state_dict(of_optimizer)
    schedule_again.load_state_dict(of_schedule)
    train(model, optimizer, schedule)
    train(again, other, schedule_again)
    both = [dict(m.named_parameters()) for m in (model, again)]
    assert largest_difference(*both) == 0


# --- wrappers -----------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(compiled(model)),
    "the other way round": lambda model: compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_patterns_and_names_are_those_without_wrappers(wrap):
    settings = MuonConfig(
        adamw_params=(r"^model\.layers\.0\.mlp",), lr_multipliers=(r"^lm_head\.weight$:2",)
    )
    found, plain = route(wrap(tiny_llama()), settings), route(tiny_llama(), settings)
    assert found == plain
    assert found.fingerprint != route(tiny_llama()).fingerprint


@pytest.mark.parametrize("pattern", [r"_orig_mod\.model\.layers\.0\.", "module.model.layers.0."])
def test_a_pattern_with_a_wrapper_in_it_is_explained(pattern):
    with pytest.raises(ValueError, match=r"those without wrappers: write 'model[\\.]"):
        route(compiled(tiny_llama()), MuonConfig(adamw_params=(pattern,)))
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        route(tiny_llama(), MuonConfig(adamw_params=("module.nothing",)))


def test_a_compiled_block_changes_no_name():
    model = tiny_llama()
    model.model.layers[0] = compiled(model.model.layers[0])
    assert route(model) == route(tiny_llama())


def by_hand(model):
    """An optimizer over the names that the model gives its parameters."""
    named = [(name, p) for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    optimizer = Muon(named, lr=1e-2)
    for number, (_, p) in enumerate(named):
        p.grad = torch.full_like(p, 1.0 + number)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("saves", [True, False])
def test_checkpoints_move_into_wrappers_and_out_of_them(wrap, saves):
    models = [tiny_llama(), wrap(tiny_llama())]
    loads, saved = (by_hand(model) for model in (models if saves else reversed(models)))
    names = list(loads.param_groups[0]["param_names"])
    state = copy.deepcopy(saved.state_dict())
    loads.load_state_dict(state)
    assert loads.param_groups[0]["param_names"] == names
    for p, q in zip(*(o.param_groups[0]["params"] for o in (loads, saved)), strict=True):
        assert torch.equal(loads.state[p]["exp_avg"], saved.state[q]["exp_avg"])
    state["param_groups"][0]["param_names"][0] += "x"
    with pytest.raises(ValueError, match="The checkpoint's routing differs"):
        loads.load_state_dict(state)


@pytest.mark.parametrize("by", ["the arguments", "the user"])
def test_a_compiled_model_in_the_trainer_has_the_state_of_a_plain_one(tmp_path, by):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    if by == "the user":  # transformers then saves weights with the wrapper in their names
        model, more = compiled(tiny_llama()), {"remove_unused_columns": False}
    else:
        model, more = tiny_llama(), {"torch_compile": True, "torch_compile_backend": "eager"}
    wrapped = find_muon(trained(tmp_path, model, **settings, **more).optimizer)
    plain = trainer_of(tmp_path / "plain").create_optimizer()
    plain.load_state_dict(torch.load(tmp_path / "checkpoint-1" / "optimizer.pt"))
    for ours, theirs in zip(plain.param_groups, wrapped.param_groups, strict=True):
        assert ours["param_names"] == theirs["param_names"]
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            assert torch.equal(plain.state[p]["exp_avg"], wrapped.state[q]["exp_avg"])
