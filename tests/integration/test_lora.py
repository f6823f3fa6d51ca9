"""LoRA factors as matrices: trained by name, saved, and loaded by stock PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import hf_muon.auto  # noqa: F401
from hf_muon.integrations.report import find_muon
from tests.integration.tiny import tiny_data, tiny_llama, trained


def adapted(**settings):
    model = tiny_llama()
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny_data(4)[0]["input_ids"][None]).logits


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_train_save_load_and_merge(tmp_path, use_dora):
    model = adapted(use_dora=use_dora)
    start = logits(model)
    trainer = trained(tmp_path, model=model)
    groups = find_muon(trainer.optimizer).param_groups
    assert [g["algorithm"] for g in groups] == (["muon", "adamw"] if use_dora else ["muon"])
    assert all("lora_" in name for name in groups[0]["param_names"])
    end = logits(trainer.model)
    assert (end - start).abs().max() > 1e-3

    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), end)
    # Merging adds BA to the weight in float32 before the product instead of after it.
    assert torch.allclose(logits(loaded.merge_and_unload()), end, atol=1e-5)


@pytest.mark.parametrize("method", ["newton_schulz", "gram", "svd"])
@pytest.mark.parametrize("order", ["pre_polar", "post_polar", "polar_only"])
def test_the_first_step_leaves_a_alone(tmp_path, order, method):
    # B = 0, so the gradient of A is exactly zero, and the polar factor of zero is zero.
    model = adapted()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trained(
        tmp_path, model=model, max_steps=1, weight_decay=0.0,
        optim_args=f"order={order},polar_method={method}",
    )  # fmt: skip
    for name, p in model.named_parameters():
        if "lora_A" in name:
            assert torch.equal(p, start[name])
        elif "lora_B" in name:
            assert not torch.equal(p, start[name])
