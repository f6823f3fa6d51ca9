"""Models with adapters: a LLaMA or another architecture of one layer, for every PEFT method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch import nn
from zoo import SIZES, built

peft = pytest.importorskip("peft")

LINEARS = ["q_proj", "down_proj"]


def adapted(adapter: Any, auto: Any = None, name: str = "llama", **values: Any) -> nn.Module:
    auto = transformers.AutoModelForCausalLM if auto is None else auto
    sizes = {**SIZES, "num_hidden_layers": 1, **values}
    return peft.get_peft_model(built(auto, name, device="cpu", **sizes), adapter)


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **settings})


def with_experts(name: str) -> nn.Module:
    """LoRA of rank 3 on both stacks of four experts."""
    experts = "feed_forward" if name == "llama4_text" else "mlp"
    targets = [f"{experts}.experts.gate_up_proj", f"{experts}.experts.down_proj"]
    adapter = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets)
    return adapted(adapter, name=name, num_local_experts=4, head_dim=8, pad_token_id=0)


def with_two_adapters(active: list[str]) -> nn.Module:
    """Rank 4 with scaling 2 on two layers, and rank 8 with scaling 0.5 on one of them."""
    model = adapted(lora())
    model.add_adapter("second", lora(r=8, lora_alpha=4, target_modules=["q_proj"]))
    model.base_model.set_adapter(active)
    return model


NOT_FACTORS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=LINEARS
    ),
    "ia3": lambda: peft.IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=LINEARS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=LINEARS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEARS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=LINEARS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "vblora": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=8, vector_length=4, target_modules=LINEARS
    ),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=LINEARS),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"]),
    "miss": lambda: peft.MissConfig(r=4, target_modules=LINEARS),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
}

ADAPTED: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: adapted(lora()),
    "rslora": lambda: adapted(lora(use_rslora=True)),
    "pissa": lambda: adapted(lora(init_lora_weights="pissa")),
    "olora": lambda: adapted(lora(init_lora_weights="olora")),
    "dora": lambda: adapted(lora(use_dora=True)),
    "lora with biases": lambda: adapted(lora(lora_bias=True)),
    "lora on embedding and head": lambda: adapted(
        lora(target_modules=["embed_tokens", "lm_head", "q_proj"])
    ),
    "modules to save": lambda: adapted(
        lora(target_modules=["q_proj"], task_type="SEQ_CLS"),
        transformers.AutoModelForSequenceClassification,
    ),
    "trainable tokens": lambda: adapted(
        lora(target_modules=["q_proj"], trainable_token_indices=[1, 2, 3])
    ),
    "two adapters": lambda: with_two_adapters(["default", "second"]),
    "experts of mixtral": lambda: with_experts("mixtral"),
    "experts of gpt_oss": lambda: with_experts("gpt_oss"),
    "experts of llama4": lambda: with_experts("llama4_text"),
    **{name: lambda make=make: adapted(make()) for name, make in NOT_FACTORS.items()},
}
