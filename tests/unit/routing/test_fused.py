"""Every declared layout cuts a fused weight into the maps that the model's own forward uses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import SIZES, ZOO, _qwen2_5_vl, config, region

from hf_muon.config import MuonConfig
from hf_muon.routing import route
from hf_muon.routing.fused import LAYOUTS

SPLIT = MuonConfig(split_fused=True)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if name.endswith("bias"):
                parameter.zero_()
    return module.eval()


def maps(model: nn.Module, name: str) -> list[torch.Tensor]:
    """The blocks of a fused weight as (out, in) matrices."""
    found = next(r for r in route(model, SPLIT).routes if r.name == name)
    parameter = dict(model.named_parameters())[name]
    assert "split" in found.reason
    views = [region(m, parameter.detach()) for m in found.matrices]
    assert sum(v.numel() for v in views) == parameter.numel()
    return [
        v.reshape(-1, v.shape[-1]).T if m.fan_out_dim == 1 else v.reshape(-1, v.shape[-1])
        for v, m in zip(views, found.matrices, strict=True)
    ]


def captured(attention: nn.Module, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """Query, key and value as the attention function gets them: (batch, heads, tokens, size)."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(module, query, key, value, *args, **kwargs):
        seen.append((query, key, value))
        out = query.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2)
        return out, None

    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    attention.config._attn_implementation = "spy"
    attention(**inputs)
    return seen[0]


def as_rows(heads: torch.Tensor) -> torch.Tensor:
    """(1, heads, tokens, size) as (tokens, heads · size)."""
    return heads[0].transpose(0, 1).reshape(heads.shape[2], -1)


def no_rotation(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, tokens, size), torch.zeros(1, tokens, size)


def small_causal(name: str, **values: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config(name, **values))


def check_attention(model, name, attention, x, generator, **inputs):
    query, key, value = captured(attention, hidden_states=x, attention_mask=None, **inputs)
    tokens = x.reshape(-1, x.shape[-1])
    for used, weight in zip((query, key, value), maps(model, name), strict=True):
        torch.testing.assert_close(tokens @ weight.T, as_rows(used))


def test_gpt2_columns(generator):
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    model = randomized(small_causal("gpt2", **sizes), generator)
    x = torch.randn(1, 5, 32, generator=generator)
    attention = model.transformer.h[0].attn
    check_attention(model, "transformer.h.0.attn.c_attn.weight", attention, x, generator)


def test_gpt2_cross_attention_holds_two_maps(generator):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "add_cross_attention": True}
    with torch.device("meta"):
        model = small_causal("gpt2", vocab_size=128, **sizes)
    routes = {r.name: r for r in route(model, SPLIT).routes}
    found = routes["transformer.h.0.crossattention.c_attn.weight"]
    assert [m.shape for m in found.matrices] == [(32, 32), (32, 32)]


def test_phi3_rows_of_unequal_sizes(generator):
    model = randomized(small_causal("phi3", **SIZES, pad_token_id=0), generator)
    x = torch.randn(1, 5, 32, generator=generator)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    rotation = no_rotation(5, 8)
    attention = model.model.layers[0].self_attn
    check_attention(model, name, attention, x, generator, position_embeddings=rotation)
    assert [tuple(m.shape) for m in maps(model, name)] == [(32, 32), (16, 32), (16, 32)]


def test_gpt_neox_interleaves_per_head(generator):
    model = randomized(small_causal("gpt_neox", **SIZES), generator)
    x = torch.randn(1, 5, 32, generator=generator)
    attention = model.gpt_neox.layers[0].attention
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    rotation = no_rotation(5, attention.rotary_ndims)
    check_attention(model, name, attention, x, generator, position_embeddings=rotation)
    tokens, (query, *_) = (
        x[0],
        captured(attention, hidden_states=x, attention_mask=None, position_embeddings=rotation),
    )
    thirds = model.get_parameter(name).detach().chunk(3)
    assert not torch.allclose(tokens @ thirds[0].T, as_rows(query))  # rows in thirds are wrong


def test_bloom_interleaves_per_head(generator):
    model = randomized(
        small_causal("bloom", vocab_size=128, hidden_size=32, n_layer=1, n_head=4), generator
    )
    attention = model.transformer.h[0].self_attention
    x = torch.randn(1, 5, 32, generator=generator)
    used = attention._reshape(attention.query_key_value(x))
    name = "transformer.h.0.self_attention.query_key_value.weight"
    for heads, weight in zip(used, maps(model, name), strict=True):
        torch.testing.assert_close(x[0] @ weight.T, as_rows(heads))


def test_qwen_vision_rows(generator):
    cfg = config("qwen2_5_vl", **_qwen2_5_vl())
    model = randomized(transformers.AutoModelForImageTextToText.from_config(cfg), generator)
    attention = model.model.visual.blocks[0].attn
    x = torch.randn(5, 32, generator=generator)
    name = "model.visual.blocks.0.attn.qkv.weight"
    rotation = (torch.ones(5, 8), torch.zeros(5, 8))
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    used = captured(attention, hidden_states=x, cu_seqlens=lengths, position_embeddings=rotation)
    for heads, weight in zip(used, maps(model, name), strict=True):
        torch.testing.assert_close(x @ weight.T, as_rows(heads))


def test_multihead_attention_rows(generator):
    model = nn.Sequential(nn.MultiheadAttention(32, 4, batch_first=True, bias=False))
    attention = randomized(model, generator)[0]
    x = torch.randn(1, 5, 32, generator=generator)
    query, key, value = (
        (x[0] @ w.T).view(5, 4, 8).transpose(0, 1) for w in maps(model, "0.in_proj_weight")
    )
    mixed = nn.functional.scaled_dot_product_attention(query, key, value)
    expected = attention.out_proj(mixed.transpose(0, 1).reshape(5, 32))
    torch.testing.assert_close(attention(x, x, x)[0][0], expected)


def test_gate_up_rows_of_an_mlp(generator):
    model = randomized(small_causal("phi3", **SIZES, pad_token_id=0), generator)
    mlp, x = model.model.layers[0].mlp, torch.randn(5, 32, generator=generator)
    gate, up = maps(model, "model.layers.0.mlp.gate_up_proj.weight")
    expected = mlp.down_proj(nn.functional.silu(x @ gate.T) * (x @ up.T))
    torch.testing.assert_close(mlp(x), expected)


def expert_io(model, prefix, experts, generator):
    """Tokens, and what the experts make of them when token t goes to expert t only."""
    x = torch.randn(4, 32, generator=generator)
    chosen, weights = torch.arange(4)[:, None], torch.ones(4, 1)
    cut = maps(model, f"{prefix}.gate_up_proj")
    return x, experts(x, chosen, weights), list(zip(cut[0::2], cut[1::2], strict=True))


def test_mixtral_experts_rows(generator):
    model = randomized(small_causal("mixtral", **SIZES, num_local_experts=4), generator)
    experts = model.model.layers[0].mlp.experts
    x, out, cut = expert_io(model, "model.layers.0.mlp.experts", experts, generator)
    for token, (gate, up) in enumerate(cut):
        hidden = nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T)
        torch.testing.assert_close(out[token], hidden @ experts.down_proj[token].T)


def test_gpt_oss_experts_interleave_columns(generator):
    model = small_causal("gpt_oss", **SIZES, num_local_experts=4, head_dim=8)
    experts = randomized(model, generator).model.layers[0].mlp.experts
    x, out, cut = expert_io(model, "model.layers.0.mlp.experts", experts, generator)
    for token, (gate, up) in enumerate(cut):
        gated = (x[token] @ gate.T).clamp(max=experts.limit)
        other = (x[token] @ up.T).clamp(-experts.limit, experts.limit)
        hidden = (other + 1) * gated * torch.sigmoid(gated * experts.alpha)
        torch.testing.assert_close(out[token], hidden @ experts.down_proj[token])


def test_llama4_experts_columns(generator):
    model = ZOO["llama4_text"].build().to_empty(device="cpu")
    experts = randomized(model, generator).model.layers[0].feed_forward.experts
    x = torch.randn(4, 32, generator=generator)
    cut = maps(model, "model.layers.0.feed_forward.experts.gate_up_proj")
    out = experts(x)
    for token, (gate, up) in enumerate(zip(cut[0::2], cut[1::2], strict=True)):
        hidden = nn.functional.silu(x[token] @ gate.T) * (x[token] @ up.T)
        torch.testing.assert_close(out[token], hidden @ experts.down_proj[token])


def test_mamba_rows(generator):
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    model = randomized(small_causal("mamba", **sizes, time_step_rank=4), generator)
    mixer, x = model.backbone.layers[0].mixer, torch.randn(1, 5, 32, generator=generator)
    states, gate = mixer.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # as the mixer's forward
    for used, weight in zip(
        (states, gate), maps(model, "backbone.layers.0.mixer.in_proj.weight"), strict=True
    ):
        torch.testing.assert_close(x[0] @ weight.T, used[0].T)


def test_every_declared_user_is_one_class_of_transformers():
    source = Path(transformers.__file__).parent / "models"
    text = "\n".join(p.read_text(encoding="utf-8") for p in source.glob("*/modeling_*.py"))
    counts = {u: text.count(f"class {u}(") for layout in LAYOUTS for u in layout.users}
    assert set(counts.values()) == {1}, counts


def test_an_undeclared_fused_weight_is_reported_and_left_whole():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj = nn.Linear(32, 96)

    with pytest.warns(UserWarning, match=r"0\.qkv_proj\.weight looks like a fused projection"):
        plan = route(nn.Sequential(Attention()), SPLIT)
    found = plan.routes[0]
    assert "no layout declared" in found.reason
    assert [m.shape for m in found.matrices] == [(96, 32)]


@pytest.mark.parametrize("name", ZOO)
def test_splitting_covers_each_parameter_once(name):
    model = ZOO[name].build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = route(model, SPLIT)
    for r in plan.muon:
        cells = [
            (torch.arange(r.numel).as_strided(m.shape, m.strides, m.offset)).flatten()
            for m in r.matrices
        ]
        assert torch.equal(torch.cat(cells).sort().values, torch.arange(r.numel)), r.name


def test_without_the_setting_nothing_is_split():
    assert all(len(r.matrices) == 1 for r in route(ZOO["phi3"].build()).muon)
