"""Models that change after the optimizer was made: what is trained, and what is said."""

import copy
import gc
import logging

import peft
import pytest
import torch
from transformers import TrainerCallback

import hf_muon.auto  # noqa: F401
from hf_muon import Muon, create_muon_optimizer
from hf_muon.integrations import untrained
from hf_muon.integrations.report import find_muon
from tests.integration.tiny import (
    VOCABULARY,
    largest_difference,
    tiny_data,
    tiny_llama,
    trained,
    trainer_of,
    weights,
)

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="hf_muon")
    return lambda: [r.getMessage() for r in caplog.records if "does not train" in r.getMessage()]


def train(model, optimizer, steps=1):
    for row in tiny_data(steps):
        ids = row["input_ids"][None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# --- loops of one's own -------------------------------------------------------------------------


def test_what_is_unfrozen_is_named_within_ten_steps(said):
    model = tiny_llama()
    model.model.layers[1].requires_grad_(False)
    optimizer = create_muon_optimizer(model, lr=1e-2)
    train(model, optimizer, 3)
    assert said() == []
    model.get_parameter(UP).requires_grad_(True)
    train(model, optimizer, untrained.EVERY)
    assert len(said()) == 1
    assert f"The optimizer does not train {UP}: since" in said()[0]
    train(model, optimizer, 2 * untrained.EVERY)
    assert len(said()) == 1


def test_the_optimizer_of_a_copy_is_named(said):
    model = tiny_llama()
    other = copy.deepcopy(model)
    optimizer = create_muon_optimizer(model, lr=1e-2)
    watched = untrained.watch(optimizer, other)
    watched.begin(other)  # as a Trainer that was given both
    watched.look(optimizer)
    [text] = said()
    assert "The optimizer does not train model.embed_tokens.weight" in text
    assert untrained.untrained(model, optimizer) == []


def adapted():
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))


def test_switched_adapters_are_named_at_once(said):
    model = adapted()
    optimizer = create_muon_optimizer(model, lr=1e-2)
    train(model, optimizer, 2)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    train(model, optimizer)
    assert said() == []  # it is not active, and frozen
    model.set_adapter("second")
    train(model, optimizer)
    assert "v_proj.lora_A.second.weight" in said()[0]
    assert "lora_A.default" not in said()[0]
    model.set_adapter("default")  # back again: its momentum has waited
    before = weights_of(model)
    train(model, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".default." in name for name in moved)
    assert len(said()) == 1
    again = create_muon_optimizer(model, lr=1e-2)
    train(model, again)
    assert len(said()) == 1


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_merged_adapters_leave_nothing_to_train_and_what_is_unfrozen_is_named(said):
    model = adapted()
    optimizer = create_muon_optimizer(model, lr=1e-2)
    train(model, optimizer)
    base = model.merge_and_unload()
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(base, optimizer)
    base.requires_grad_(True)
    train(base, optimizer)
    assert "does not train base_model.model.model.embed_tokens.weight" in said()[0]


def test_an_embedding_that_grows_before_the_first_step(said):
    model = tiny_llama()
    optimizer = create_muon_optimizer(model, lr=1e-2)
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    before = weights_of(model)
    train(model, optimizer)
    # transformers grows the embedding in its place, and replaces the head.
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert "does not train lm_head.weight: since it was made" in said()[0]
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_an_embedding_that_grows_later_stops_the_run():
    model = tiny_llama()
    optimizer = create_muon_optimizer(model, lr=1e-2)
    train(model, optimizer)
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"embed_tokens.* \(128, 32\) and \(136, 32\) is expected"):
        train(model, optimizer)
    assert largest_difference_of(model, before) == 0


def largest_difference_of(model, before):
    return largest_difference(weights_of(model), before)


def test_a_matrix_that_grows_stops_the_run():
    model = tiny_llama()
    optimizer = create_muon_optimizer(model, lr=1e-2)
    weight = model.get_parameter(UP)
    weight.data = torch.zeros(50, 32)
    weight.grad = torch.ones(50, 32)
    with pytest.raises(ValueError, match=r"up_proj.*was resized after the optimizer was built"):
        optimizer.step()


def test_what_other_optimizers_train_is_not_named(said):
    model = tiny_llama()
    layers = [p for name, p in model.named_parameters() if "layers" in name]
    optimizer = create_muon_optimizer(model, lr=1e-2, groups=layers)
    train(model, optimizer, 2)
    assert said() == []
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    model.lm_head.register_parameter("more", torch.nn.Parameter(torch.zeros(2)))
    train(model, optimizer, untrained.EVERY)
    assert "does not train lm_head.more:" in said()[0]


def test_the_watch_holds_neither_model_nor_optimizer(said):
    model = tiny_llama()
    optimizer = create_muon_optimizer(model, lr=1e-2)
    watched = untrained.watch(optimizer, model)
    copied = copy.deepcopy(optimizer)
    assert isinstance(copied, Muon)
    assert not copied._optimizer_step_pre_hooks
    del model, optimizer, copied
    gc.collect()
    assert watched.model() is None


def test_a_look_is_rare(monkeypatch):
    looks = []
    monkeypatch.setattr(untrained.Watch, "look", lambda self, optimizer: looks.append(self.steps))
    model = tiny_llama()
    train(model, create_muon_optimizer(model, lr=1e-2), 25)
    assert looks == [0, 10, 20]


# --- the Trainer --------------------------------------------------------------------------------


class At(TrainerCallback):
    """Does something to the model at the beginning of a step, and at that of training."""

    def __init__(self, step, act, begin=None):
        self.step, self.act, self.begin = step, act, begin

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.begin is not None:
            self.begin(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.act(model)


def freeze(model):
    model.model.layers[1].requires_grad_(False)


def unfreeze(model):
    model.model.layers[1].requires_grad_(True)


def test_layers_are_unfrozen_by_schedule_if_the_optimizer_has_them(tmp_path, said):
    # Frozen when training begins, not before the Trainer is made.
    callback = At(2, unfreeze, freeze)
    trainer = trainer_of(tmp_path, trainer_settings={"callbacks": [callback]}, max_steps=4)
    before = weights(trainer)
    trainer.train()
    assert said() == []
    optimizer = find_muon(trainer.optimizer)
    counts = {name: int(optimizer.state[p]["step"]) for name, p in trainer.model.named_parameters()}
    assert {counts[name] for name in counts if "layers.1" in name} == {2}
    assert {counts[name] for name in counts if "layers.1" not in name} == {4}
    assert largest_difference({UP: weights(trainer)[UP]}, {UP: before[UP]}) > 1e-4


def test_what_a_callback_unfreezes_is_named_before_the_log_comes(tmp_path, said):
    model = tiny_llama()
    freeze(model)
    steps = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(len(said()))

    callbacks = {"callbacks": [At(3, unfreeze), Note()]}
    trainer_of(tmp_path, model, max_steps=14, logging_steps=500, trainer_settings=callbacks).train()
    assert steps == [0] * 10 + [1] * 4
    assert "and 4 more" in said()[0]


def test_a_second_training_takes_a_new_optimizer_for_what_has_grown(tmp_path, said):
    trainer = trained(tmp_path)
    trainer.model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    with pytest.raises(ValueError, match="was the model resized after the optimizer was built"):
        trainer.train()
    assert "does not train lm_head.weight" in said()[0]
    trainer.optimizer = None
    before = weights(trainer)
    trainer.train()
    assert len(said()) == 1
    after = weights(trainer)
    assert all(not torch.equal(after[name], before[name]) for name in before)
