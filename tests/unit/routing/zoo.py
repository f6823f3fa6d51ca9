"""Tiny models of twenty architectures, built on the meta device, and what each must count.

Counts are parameters: two-dimensional to Muon, three-dimensional stacks to Muon, two or more
dimensions to AdamW, fewer than two dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Model:
    """How to build one architecture, and its counts."""

    build: Callable[[], nn.Module]
    counts: tuple[int, int, int, int]


def region(matrix: Any, parameter: torch.Tensor) -> torch.Tensor:
    """The elements of a matrix, in the shape the matrix gives them."""
    return parameter.contiguous().as_strided(matrix.shape, matrix.strides, matrix.offset)


def config(name: str, **values: Any) -> Any:
    return transformers.AutoConfig.for_model(name, **values)


def built(auto: Any, name: str, device: str = "meta", **values: Any) -> nn.Module:
    with torch.device(device):
        return auto.from_config(config(name, **values))


def causal(name: str, **values: Any) -> Callable[[], nn.Module]:
    return lambda: built(transformers.AutoModelForCausalLM, name, **{**SIZES, **values})


def bare(auto: str, name: str, **values: Any) -> Callable[[], nn.Module]:
    return lambda: built(getattr(transformers, auto), name, **values)


def composite(auto: str, name: str, make: Callable[[], dict[str, Any]]) -> Callable[[], nn.Module]:
    return lambda: built(getattr(transformers, auto), name, **make())


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TOWER = {**VISION, "num_hidden_layers": 1, "projection_dim": 16}
TEXT_TOWER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "projection_dim": 16,
}
MAMBA = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def _qwen2_5_vl() -> dict[str, Any]:
    return {
        "text_config": {
            **SIZES,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 10000.0,
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
        },
    }


ZOO: dict[str, Model] = {
    "llama": Model(causal("llama"), (14, 0, 2, 5)),
    "qwen3": Model(causal("qwen3", head_dim=8), (14, 0, 2, 9)),
    "gemma3_text": Model(causal("gemma3_text", head_dim=8), (14, 0, 1, 13)),
    "phi3": Model(causal("phi3", pad_token_id=0), (8, 0, 2, 5)),
    "gpt2": Model(
        bare(
            "AutoModelForCausalLM",
            "gpt2",
            vocab_size=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
        ),
        (8, 0, 2, 18),
    ),
    "gpt_neox": Model(causal("gpt_neox"), (8, 0, 2, 18)),
    "opt": Model(causal("opt", ffn_dim=48, word_embed_proj_dim=16, pad_token_id=0), (14, 0, 2, 22)),
    "mixtral": Model(causal("mixtral", num_local_experts=4), (8, 4, 4, 5)),
    "qwen3_moe": Model(
        causal("qwen3_moe", num_experts=4, moe_intermediate_size=24, head_dim=8), (8, 4, 4, 9)
    ),
    "gpt_oss": Model(causal("gpt_oss", num_local_experts=4, head_dim=8), (8, 4, 8, 17)),
    "llama4_text": Model(
        causal(
            "llama4_text",
            num_local_experts=4,
            head_dim=8,
            intermediate_size_mlp=48,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        (14, 4, 4, 5),
    ),
    "jamba": Model(
        causal(
            "jamba",
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
        (11, 2, 5, 11),
    ),
    "mamba": Model(bare("AutoModelForCausalLM", "mamba", **MAMBA, time_step_rank=4), (8, 0, 5, 9)),
    "bert": Model(
        bare("AutoModelForMaskedLM", "bert", **SIZES | {"num_key_value_heads": 4}), (12, 0, 4, 26)
    ),
    "llama#cls": Model(bare("AutoModelForSequenceClassification", "llama", **SIZES), (14, 0, 2, 5)),
    "t5": Model(
        bare(
            "AutoModelForSeq2SeqLM",
            "t5",
            vocab_size=128,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
        ),
        (32, 0, 3, 12),
    ),
    "vit": Model(bare("AutoModelForImageClassification", "vit", **VISION), (12, 0, 4, 24)),
    "clip": Model(
        bare("AutoModel", "clip", text_config=TEXT_TOWER, vision_config=TOWER, projection_dim=16),
        (14, 0, 4, 28),
    ),
    "llava": Model(
        bare(
            "AutoModelForImageTextToText",
            "llava",
            text_config={"model_type": "llama", **SIZES},
            vision_config={"model_type": "clip_vision_model", **VISION},
        ),
        (28, 0, 4, 32),
    ),
    "qwen2_5_vl": Model(
        composite("AutoModelForImageTextToText", "qwen2_5_vl", _qwen2_5_vl), (26, 0, 3, 28)
    ),
}
