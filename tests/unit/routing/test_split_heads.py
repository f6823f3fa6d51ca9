"""``split_heads`` makes a matrix of each attention head that the model's own forward uses."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
import transformers
from test_fused import captured, no_rotation, randomized, small_causal
from torch import nn
from zoo import SIZES, ZOO, config, region

from hf_muon import create_muon_optimizer
from hf_muon.config import MuonConfig
from hf_muon.routing import route

PER_HEAD = MuonConfig(split_heads=True)
MLA = {
    **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size")},
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def found(model: nn.Module, suffix: str, settings: MuonConfig = PER_HEAD):
    return next(r for r in route(model, settings).routes if r.name.endswith(suffix))


def per_head(model: nn.Module, suffix: str) -> list[torch.Tensor]:
    """The heads of a projection as (head size, in) matrices."""
    one = found(model, suffix)
    weight = model.get_parameter(one.name).detach()
    views = [region(matrix, weight) for matrix in one.matrices]
    assert sum(view.numel() for view in views) == weight.numel()
    return [v.T if m.fan_out_dim == 1 else v for v, m in zip(views, one.matrices, strict=True)]


def attention_of(model: nn.Module, ending: str = "self_attn") -> nn.Module:
    return next(m for name, m in model.named_modules() if name.endswith(ending))


def compare(used: torch.Tensor, tokens: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """Heads as the attention gets them, (1, heads, tokens, size), are products with matrices."""
    assert used.shape[1] == len(weights)
    for head, weight in zip(used[0], weights, strict=True):
        torch.testing.assert_close(head, tokens @ weight.T)


def test_llama_with_fewer_keys_than_queries(generator):
    model = randomized(small_causal("llama", **SIZES), generator)
    x = torch.randn(1, 5, 32, generator=generator)
    inputs = {"hidden_states": x, "attention_mask": None}
    used = captured(attention_of(model), **inputs, position_embeddings=no_rotation(5, 8))
    for name, heads in zip("qkv", used, strict=True):
        compare(heads, x[0], per_head(model, f"0.self_attn.{name}_proj.weight"))
    assert [m.shape for m in found(model, "q_proj.weight").matrices] == [(8, 32)] * 4
    assert [m.shape for m in found(model, "k_proj.weight").matrices] == [(8, 32)] * 2
    assert len(found(model, "o_proj.weight").matrices) == 1
    with pytest.raises(AssertionError):
        compare(used[0], x[0], per_head(model, "1.self_attn.q_proj.weight"))


@pytest.mark.parametrize("rank", [12, None], ids=["q_b_proj", "q_proj"])
def test_latent_attention_of_deepseek(generator, rank):
    settings = {**MLA, "q_lora_rank": rank}
    model = randomized(small_causal("deepseek_v3", **settings), generator)
    attention = attention_of(model)
    x = torch.randn(1, 5, 32, generator=generator)
    inputs = {"hidden_states": x, "attention_mask": None}
    query, key, value = captured(attention, **inputs, position_embeddings=no_rotation(5, 4))
    name = "q_proj.weight" if rank is None else "q_b_proj.weight"
    latent = x if rank is None else attention.q_a_layernorm(attention.q_a_proj(x))
    # The rotated part is stored interleaved and comes out in halves.
    order = [*range(6), *(6 + i for i in (0, 2, 1, 3))]
    compare(query, latent[0], [weight[order] for weight in per_head(model, name)])
    latent = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(x)[..., :8])
    both = torch.cat((key[..., :6], value), dim=-1)
    compare(both, latent[0], per_head(model, "kv_b_proj.weight"))
    assert len(found(model, "kv_a_proj_with_mqa.weight").matrices) == 1


def test_gpt2_columns(generator):
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    model = randomized(small_causal("gpt2", **sizes), generator)
    x = torch.randn(1, 5, 32, generator=generator)
    used = captured(attention_of(model, "attn"), hidden_states=x, attention_mask=None)
    compare(torch.cat(used, dim=1), x[0], per_head(model, "c_attn.weight"))
    assert len(found(model, "c_proj.weight").matrices) == 1


def test_phi3_rows(generator):
    model = randomized(small_causal("phi3", **SIZES, pad_token_id=0), generator)
    x = torch.randn(1, 5, 32, generator=generator)
    inputs = {"hidden_states": x, "attention_mask": None}
    used = captured(attention_of(model), **inputs, position_embeddings=no_rotation(5, 8))
    compare(torch.cat(used, dim=1), x[0], per_head(model, "0.self_attn.qkv_proj.weight"))


def test_gpt_neox_is_interleaved(generator):
    model = randomized(small_causal("gpt_neox", **SIZES), generator)
    x = torch.randn(1, 5, 32, generator=generator)
    attention = attention_of(model, "attention")
    inputs = {"hidden_states": x, "attention_mask": None}
    rotation = no_rotation(5, attention.rotary_ndims)
    used = captured(attention, **inputs, position_embeddings=rotation)
    interleaved = torch.stack(used, dim=2).flatten(1, 2)
    compare(interleaved, x[0], per_head(model, "0.attention.query_key_value.weight"))


def test_bert_and_t5_say_their_heads_otherwise():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    bert = transformers.AutoModelForMaskedLM.from_config(config("bert", **sizes))
    assert [m.shape for m in found(bert, "self.key.weight").matrices] == [(8, 32)] * 4
    sizes = {"d_model": 32, "d_kv": 6, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    t5 = transformers.AutoModelForSeq2SeqLM.from_config(config("t5", **sizes))
    assert [m.shape for m in found(t5, "SelfAttention.v.weight").matrices] == [(6, 32)] * 4


def test_multihead_attention():
    layer = nn.TransformerEncoderLayer(32, 4, 48)
    one = found(nn.Sequential(layer, layer), "in_proj_weight")
    assert [m.shape for m in one.matrices] == [(8, 32)] * 12


@pytest.mark.parametrize("name", ZOO)
def test_heads_cover_each_parameter_once_and_nothing_else_changes(name):
    model = ZOO[name].build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, after = route(model), route(model, PER_HEAD)
    for old, new in zip(before.routes, after.routes, strict=True):
        if "per head" not in new.reason:
            assert dataclasses.replace(new, reason=old.reason) == old
            continue
        assert old.matrices != new.matrices
        cells = [region(m, torch.arange(new.numel)).flatten() for m in new.matrices]
        assert torch.equal(torch.cat(cells).sort().values, torch.arange(new.numel)), new.name
    assert after.fingerprint != before.fingerprint or not any(
        "per head" in one.reason for one in after.routes
    )


def test_with_split_fused_heads_go_first_and_the_rest_is_cut_as_before():
    model = ZOO["phi3"].build()
    both = MuonConfig(split_fused=True, split_heads=True)
    assert len(found(model, "0.self_attn.qkv_proj.weight", both).matrices) == 8
    assert len(found(model, "0.mlp.gate_up_proj.weight", both).matrices) == 2


class Attention(nn.Module):
    """Says as much about its heads as those of transformers, and is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.q_proj = nn.Linear(32, 32)
        self.other = nn.Linear(32, 32)


def test_a_class_that_is_not_known_keeps_its_matrices():
    model = nn.Sequential(Attention(), Attention())
    assert found(model, "0.q_proj.weight").reason == (
        "linear, no heads declared: not split by them"
    )
    assert route(model).fingerprint == route(model, PER_HEAD).fingerprint


def test_a_projection_that_holds_more_than_heads_stays_whole():
    model = small_causal("llama", **SIZES)
    attention = attention_of(model)
    attention.q_proj = nn.Linear(32, 64)  # a gate beside each query, say
    assert "no heads declared" in found(model, "0.self_attn.q_proj.weight").reason
    assert "per head" in found(model, "1.self_attn.q_proj.weight").reason


def test_heads_of_one_row_are_vectors_and_stay_together():
    model = small_causal("llama", **{**SIZES, "head_dim": 1})
    assert len(found(model, "q_proj.weight").matrices) == 1


def test_the_table_counts_heads():
    model = small_causal("llama", **SIZES)
    line = next(
        one for one in route(model, PER_HEAD).table().splitlines() if "0.self_attn.q" in one
    )
    assert "4 of 8 × 32" in line
    assert "linear, per head: q_proj holds 4" in line


def test_adapters_are_not_split():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        small_causal("llama", **SIZES), peft.LoraConfig(r=4, target_modules=["q_proj"])
    )
    assert route(model, PER_HEAD).fingerprint == route(model).fingerprint


def test_settings_travel_as_strings_and_json(tmp_path):
    assert MuonConfig.from_optim_args("split_heads=true") == PER_HEAD
    path = tmp_path / "muon.json"
    path.write_text(json.dumps(PER_HEAD.to_dict()))
    assert MuonConfig.from_json(path) == PER_HEAD
    with pytest.raises(ValueError, match="split_heads='perhaps'"):
        MuonConfig(split_heads="perhaps")


def polar(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def test_a_step_orthogonalizes_each_head_and_scales_it_by_its_own_shape(generator):
    model = small_causal("llama", **SIZES).double()
    optimizer = create_muon_optimizer(
        model,
        lr=0.1,
        config=MuonConfig(
            split_heads=True, polar_method="svd", polar_dtype="float64", order="polar_only"
        ),
    )
    weight = attention_of(model).k_proj.weight
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).double()
    before, gradient = weight.detach().clone(), weight.grad.clone()
    optimizer.step()
    heads = [before[i : i + 8] - 0.1 * 0.2 * 32**0.5 * polar(gradient[i : i + 8]) for i in (0, 8)]
    torch.testing.assert_close(weight.detach(), torch.cat(heads), rtol=0, atol=1e-12)
    whole = before - 0.1 * 0.2 * 32**0.5 * polar(gradient)
    assert (weight - whole).abs().max() > 1e-3


def test_a_checkpoint_of_whole_matrices_is_refused():
    model = small_causal("llama", **SIZES)
    whole = create_muon_optimizer(model, lr=0.1)
    split = create_muon_optimizer(model, lr=0.1, config=PER_HEAD)
    assert split.param_groups[0]["matrices"][0] == tuple(
        tuple(m) for m in found(model, "q_proj.weight").matrices
    )
    with pytest.raises(ValueError, match="split_fused and split_heads it was trained with"):
        split.load_state_dict(whole.state_dict())
