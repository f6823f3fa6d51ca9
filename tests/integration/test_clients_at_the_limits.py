"""What clients meet at the limits: NaN losses, nothing for Muon, rates that are overwritten."""

import peft
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Trainer, TrainerCallback

import hf_muon.auto  # noqa: F401
from hf_muon import create_muon_optimizer
from hf_muon.integrations.report import find_muon
from tests.integration.tiny import (
    arguments,
    largest_difference,
    tiny_data,
    tiny_llama,
    trainer_of,
    weights,
)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_nan_ends_the_run_and_changes_nothing(filtered, tmp_path):
    class Spoiled(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss * (float("nan") if self.state.global_step == 2 else 1)

    # The filter is one of what is logged; AdamW would write the NaN into the weights.
    args = arguments(tmp_path, logging_nan_inf_filter=filtered, max_grad_norm=0)
    trainer = Spoiled(model=tiny_llama(), args=args, train_dataset=tiny_data())
    with pytest.raises(FloatingPointError, match=r"holds NaN or infinity in model\..* and 16 more"):
        trainer.train()
    before = trainer_of(tmp_path, max_steps=4, max_grad_norm=0)
    before.add_callback(StopAt(2))
    before.train()
    assert largest_difference(weights(trainer), weights(before)) == 0
    states = [find_muon(t.optimizer).state.values() for t in (trainer, before)]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_without_a_matrix_for_muon_are_refused_before_training(config, tmp_path):
    model = peft.get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match=r"Nothing to train with Muon: all .* went to AdamW"):
        trainer_of(tmp_path, model).train()


def test_one_rate_for_a_cycle_is_that_of_both_halves_and_a_list_keeps_them(tmp_path):
    def rates(max_lr):
        model = tiny_llama()
        optimizer = create_muon_optimizer(model, lr=1e-2, adamw_lr=1e-3)
        of_groups = [group["lr"] for group in optimizer.param_groups]
        schedule = OneCycleLR(
            optimizer, max_lr(of_groups), total_steps=10, pct_start=0.5, cycle_momentum=False
        )
        for _ in range(5):
            optimizer.step()
            schedule.step()
        return of_groups, [group["lr"] for group in optimizer.param_groups]

    of_groups, found = rates(max)
    assert len(set(of_groups)) == 2
    assert found == pytest.approx([found[0]] * len(found))
    of_groups, found = rates(list)
    ratios = [rate / own for rate, own in zip(found, of_groups, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
