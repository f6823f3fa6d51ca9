"""LoRA under the stock Trainer and TRL: products of factors, several adapters, low precision."""

import logging

import datasets
import pytest
import tokenizers
import torch
import trl
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

import hf_muon.auto  # noqa: F401
from hf_muon import route
from hf_muon.config import MuonConfig
from hf_muon.integrations.report import find_muon
from tests.integration.tiny import (
    VOCABULARY,
    arguments,
    largest_difference,
    tiny_data,
    tiny_llama,
    trained,
    trainer_of,
    weights,
)

UPDATES = pytest.mark.parametrize("update", ["product", "tangent"])


def config_of(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})


def adapted(seed=1, model=None, **settings):
    model = tiny_llama() if model is None else model
    torch.manual_seed(seed)
    return get_peft_model(model, config_of(**settings))


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny_data(4)[0]["input_ids"][None]).logits


def factors(model):
    """The trainable weights, copied."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# Two batches, seen again and again.
MEMORIZED = {"data": tiny_data(8), "max_steps": 12, "learning_rate": 0.1, "weight_decay": 0.0}


@UPDATES
def test_pairs_train_and_stock_peft_loads_them(tmp_path, update):
    trainer = trained(tmp_path, model=adapted(), optim_args=f"lora_update={update}", **MEMORIZED)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.1
    (group,) = find_muon(trainer.optimizer).param_groups
    assert group["lora_update"] == update
    assert set(group["scalings"]) == {2.0}
    end = logits(trainer.model)
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")), end)


def test_each_update_trains_otherwise(tmp_path):
    runs = [
        weights(trained(tmp_path, model=adapted(), optim_args=f"lora_update={update}"))
        for update in ("factor", "product", "tangent")
    ]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert largest_difference(runs[one], runs[other]) > 1e-3


@pytest.mark.parametrize("optim_args", [
    "lora_update=product", "lora_update=tangent,tangent_balance_every=2,tangent_iterations=2",
])  # fmt: skip
def test_resume_is_bitwise(tmp_path, optim_args):
    settings = {"optim_args": optim_args, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    uninterrupted = trained(tmp_path, model=adapted(), **settings)
    resumed = trainer_of(tmp_path, model=adapted(seed=2), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(weights(uninterrupted), weights(resumed)) == 0
    # Control: without the optimizer's state the same checkpoint ends elsewhere.
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    fresh = trainer_of(tmp_path, model=adapted(seed=2), **settings)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(weights(uninterrupted), weights(fresh)) > 1e-4


@UPDATES
def test_gradient_checkpointing_gives_the_same_weights(tmp_path, update):
    plain, recomputed = (
        weights(
            trained(
                tmp_path, model=adapted(), optim_args=f"lora_update={update},polar_dtype=float32",
                activation_checkpointing=on,
            )
        )
        for on in (False, True)
    )  # fmt: skip
    # The recomputed activations are the same numbers.
    assert largest_difference(plain, recomputed) < 1e-6


@UPDATES
def test_two_adapters_are_pairs_of_their_own(tmp_path, update):
    model = adapted()
    model.add_adapter("second", config_of(r=8, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    model.set_requires_grad(["default", "second"])
    start = factors(model)
    trainer = trained(tmp_path, model=model, optim_args=f"lora_update={update}")
    (group,) = find_muon(trainer.optimizer).param_groups
    assert set(group["scalings"]) == {2.0, 0.5}
    for name, partner in zip(group["param_names"], group["pairs"], strict=True):
        assert ("second" in name) is ("second" in partner)
    assert all(not torch.equal(p, start[name]) for name, p in factors(trainer.model).items())


def test_dora_trains_each_factor_and_says_so(tmp_path, caplog):
    runs = {}
    for update in ("factor", "product"):
        with caplog.at_level(logging.WARNING, logger="hf_muon"):
            caplog.clear()
            trainer = trained(
                tmp_path, model=adapted(use_dora=True), optim_args=f"lora_update={update}"
            )
        runs[update] = weights(trainer)
        said = "28 LoRA factors are updated one by one" in caplog.text
        assert said is (update == "product")
    assert "because DoRA normalizes W + cBA" in caplog.text
    assert largest_difference(runs["factor"], runs["product"]) == 0
    plan = route(adapted(use_dora=True), MuonConfig(lora_update="product"))
    assert {r.lora_update for r in plan.muon} == {"factor"}
    assert all("lora_update='factor' because DoRA" in r.reason for r in plan.muon)


def test_a_pair_with_a_frozen_factor_trains_the_other_and_says_so(tmp_path, caplog):
    model = adapted()
    for name, p in model.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            p.requires_grad_(False)
    with caplog.at_level(logging.WARNING, logger="hf_muon"):
        trainer = trained(tmp_path, model=model, optim_args="lora_update=product")
    assert "7 LoRA factors are updated one by one" in caplog.text
    assert "because Muon does not train its partner" in caplog.text
    updates = {
        group["lora_update"]: len(group["params"])
        for group in find_muon(trainer.optimizer).param_groups
    }
    assert updates == {"factor": 7, "product": 14}


@UPDATES
def test_weights_in_bfloat16(tmp_path, update):
    model = tiny_llama().bfloat16()
    torch.manual_seed(1)
    model = get_peft_model(model, config_of(), autocast_adapter_dtype=False)
    trainer = trained(
        tmp_path, model=model, optim_args=f"lora_update={update},momentum_dtype=float32",
        **MEMORIZED,
    )  # fmt: skip
    optimizer = find_muon(trainer.optimizer)
    weight = optimizer.param_groups[0]["params"][0]
    assert weight.dtype == torch.bfloat16
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.1


def test_a_model_without_factors_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"lora_update='product' is for LoRA factors"):
        trainer_of(tmp_path, optim_args="lora_update=product")


@pytest.mark.parametrize("method", ["newton_schulz", "gram", "svd"])
@pytest.mark.parametrize("settings", [
    "order=pre_polar", "order=post_polar", "order=polar_only",
    "lora_update=product", "lora_update=tangent",
])  # fmt: skip
def test_the_first_step_leaves_a_alone(tmp_path, settings, method):
    # B = 0, so the gradient of A is exactly zero, and the polar factor of zero is zero.
    model = adapted()
    start = factors(model)
    trained(
        tmp_path, model=model, max_steps=1, optim_args=f"{settings},polar_method={method}",
        weight_decay=0.1 if "lora" in settings else 0.0,
    )  # fmt: skip
    for name, p in factors(model).items():
        assert torch.equal(p, start[name]) is ("lora_A" in name)


# --- TRL ----------------------------------------------------------------------------------------


def tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<pad>": 126, "<end>": 127}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<end>")


@pytest.mark.parametrize("update", ["factor", "product", "tangent"])
def test_trl_fine_tunes_with_adapters_of_its_own_making(tmp_path, update):
    texts = [" ".join(f"w{(7 * i + j) % 50}" for j in range(12)) for i in range(8)]
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=arguments(
            tmp_path, trl.SFTConfig, optim_args=f"lora_update={update}", max_length=16,
            max_steps=12, learning_rate=0.1, weight_decay=0.0,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=config_of(),
    )  # fmt: skip
    start = factors(trainer.model)
    trainer.train()
    (group,) = find_muon(trainer.optimizer).param_groups
    assert group["lora_update"] == update
    assert len(group["params"]) == 28
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, start[name]) for name, p in factors(trainer.model).items())


# --- QLoRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["factor", "product", "tangent"])
def test_adapters_of_a_base_model_in_four_bits(tmp_path, update):
    tiny_llama().save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantized, device_map="cpu"
    )
    model = adapted(model=prepare_model_for_kbit_training(base))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert sum(p.dtype == torch.uint8 for p in start.values()) == 14
    trainer = trained(tmp_path, model=model, optim_args=f"lora_update={update}", **MEMORIZED)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.1
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, start[name]) is ("lora_" not in name)
    assert {r.algorithm for r in route(model).routes} == {"muon"}
