"""The recipes' own learning rates: which parameter gets which, under AdamW and under Muon."""

import sys

import pytest
from torch import nn
from transformers import TrainingArguments

from hf_muon import MuonConfig, create_muon_optimizer
from tests.integration.recipes import import_recipe

import_recipe("llama_pretrain")
rates = sys.modules["shared.rates"]
RecipeError = sys.modules["shared.arguments"].RecipeError
GIVEN = {"optim": "adamw_torch", "optim_args": None}


@pytest.fixture
def model():
    first, second, head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
    return nn.ModuleDict({"first": first, "second": second, "lm_head": head})


def by_name(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize(
    ("other", "factors", "first_weight", "second_weight", "bias"),
    [(None, "first:4", 4e-3, 1e-3, 1e-3), (0.1, "first:4", 4e-3, 1e-3, 0.1),
     (0.1, None, 1e-3, 1e-3, 0.1), (0.1, r"weight:0.5|second\.bias:3", 5e-4, 5e-4, 0.3)],
)  # fmt: skip
def test_both_optimizers_train_each_parameter_at_the_same_rate(
    model, other, factors, first_weight, second_weight, bias
):
    settings = rates.RateSettings(other_learning_rate=other, lr_multipliers=factors)
    args = TrainingArguments(optim="adamw_torch", learning_rate=1e-3, use_cpu=True)
    kind, arguments = rates.adamw_at_rates(args, settings)
    found = by_name(kind()(model, **arguments), model)
    assert found["first.weight"] == pytest.approx(first_weight)
    assert found["second.weight"] == pytest.approx(second_weight)
    assert found["second.bias"] == pytest.approx(bias)

    values = GIVEN | vars(settings) | {"optim": "muon"}
    rates.pass_rates(values)
    config = MuonConfig.from_optim_args(values["optim_args"], lr=1e-3)
    assert by_name(create_muon_optimizer(model, config), model) == pytest.approx(found)


def test_one_rate_leaves_the_optimizer_to_the_trainer():
    args = TrainingArguments(optim="adamw_torch", use_cpu=True)
    assert rates.adamw_at_rates(args, rates.RateSettings()) is None


@pytest.mark.parametrize("optim", ["adamw_torch", "muon"])
@pytest.mark.parametrize("factors", ["", " ", "a{1,2}:4"])
def test_factors_that_cannot_be_passed_on_are_refused(optim, factors):
    values = GIVEN | {"optim": optim, "other_learning_rate": None, "lr_multipliers": factors}
    with pytest.raises(RecipeError, match=r"lr_multipliers='.*PATTERN:FACTOR is expected"):
        rates.pass_rates(values)


def test_rates_without_effect_are_refused():
    values = GIVEN | {"other_learning_rate": None, "lr_multipliers": "lora_B:4"}
    rates.pass_rates(values)
    assert values["optim_args"] is None  # AdamW gets them otherwise
    with pytest.raises(RecipeError, match="lr_multipliers=lora_B:4 needs Muon or AdamW"):
        rates.pass_rates(values | {"optim": "sgd"})
    with pytest.raises(RecipeError, match="both say what lr_multipliers is"):
        rates.pass_rates(values | {"optim": "muon", "optim_args": "lr_multipliers=head:2"})
