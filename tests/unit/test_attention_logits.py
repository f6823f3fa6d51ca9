"""The attention modules that QK-clip declares: their logits, and what scaling does to them.

Every declared class is built small, so that its own forward says whether γ of a head makes its
logits γ times as large.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flex_attention_mask

from hf_muon.integrations.attention_logits import LogitObserver, largest_logits
from hf_muon.integrations.attentions import LAYOUTS, find_attentions
from hf_muon.integrations.row_scaling import scale_attention
from tests.reference import attention as reference

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,  # of what is rotated
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense"],
}
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
MODELS = {
    "arcee": {},
    "bamba": {"attn_layer_indices": [0], "mamba_n_heads": 4, "mamba_d_head": 16},
    "cohere": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "diffllama": {},
    "ernie4_5": {},
    "gemma": {},
    "gemma2": {},
    "glm": {},
    "glm4": {},
    "glm4_moe_lite": LATENT,
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": EXPERTS,
    "granite": {},
    "granitemoe": EXPERTS,
    "helium": {},
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "llama": {"attention_bias": True},
    "ministral": {},
    "mistral": {"sliding_window": 4},
    "mixtral": EXPERTS,
    "nemotron": {},
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS,
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "youtu": LATENT,
}


def built(name, **more):
    settings = {**SIZES, **MODELS.get(name, {}), **more}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def logits_of(model, tokens, **inputs):
    """The largest logit of each head of each attention module."""
    observer = LogitObserver(find_attentions(model))
    observer.open()
    with torch.no_grad():
        model(tokens, **inputs)
    observer.close()
    return observer.take(torch.device("cpu"), torch.float64)


@pytest.fixture
def tokens():
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_gamma_of_each_head_is_the_ratio_of_its_logits(name, tokens):
    model = built(name)
    (attention,) = find_attentions(model)
    (before,) = logits_of(model, tokens)
    assert len(before) == attention.heads
    gamma = torch.linspace(0.3, 1, attention.heads, dtype=torch.float64)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    scale_attention(attention, gamma)
    (after,) = logits_of(model, tokens)
    torch.testing.assert_close(after, gamma * before, rtol=1e-6, atol=0)  # some rotate in float32
    assert (after - before).abs()[:-1].min() > 1e-3  # it was not small anyway
    changed = {key for key, value in model.state_dict().items() if not value.equal(kept[key])}
    parts = {key.rpartition(".")[0].rpartition(".")[2] for key in changed}
    assert parts == set(attention.projections)


def test_every_declared_class_is_tried():
    tried = {type(find_attentions(built(name))[0].module).__name__ for name in MODELS}
    assert tried == {user for layout in LAYOUTS for user in layout.users}


def test_values_and_shared_keys_stay_as_they_are(tokens):
    model = built("deepseek_v3")
    (attention,) = find_attentions(model)
    module = attention.module
    kept = {key: value.clone() for key, value in module.state_dict().items()}
    scale_attention(attention, torch.full((4,), 0.25, dtype=torch.float64))
    now = {key: value / kept[key] for key, value in module.state_dict().items()}
    query = now["q_b_proj.weight"].view(4, 10, -1)
    both = now["kv_b_proj.weight"].view(4, 11, -1)
    ones = torch.ones_like
    torch.testing.assert_close(query[:, :6], 0.5 * ones(query[:, :6]))  # q^C by √γ
    torch.testing.assert_close(query[:, 6:], 0.25 * ones(query[:, 6:]))  # q^R by γ
    torch.testing.assert_close(both[:, :6], 0.5 * ones(both[:, :6]))  # k^C by √γ
    assert both[:, 6:].equal(ones(both[:, 6:]))  # v
    assert now["kv_a_proj_with_mqa.weight"].eq(1).all()  # k^R


def no_attention(module, query, key, value, mask, **more):
    """In the place of flex attention's kernel, which knows no float64."""
    return query.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2), None


@pytest.mark.parametrize("kind", ["eager", "sdpa", "blocks"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_logits_are_those_inside_the_mask(tokens, name, kind, padded):
    if kind == "blocks":
        AttentionInterface.register(kind, no_attention)
        AttentionMaskInterface.register(kind, flex_attention_mask)
    model = built(name)
    model.set_attn_implementation(kind)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[0, :5] = not padded
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & seen[:, None, None]
    (found,) = logits_of(model, tokens, **({"attention_mask": seen.long()} if padded else {}))
    (expected,) = reference.largest_logits(model, tokens, mask)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # angles are float32
    (outside,) = reference.largest_logits(model, tokens, torch.ones_like(mask))
    assert not torch.allclose(outside, expected, rtol=1e-3)


def test_autocast_does_not_round_the_logits(tokens):
    model = built("llama").float()
    (exact,) = logits_of(model, tokens)
    query = torch.randn(1, 4, 9, 8)
    key = torch.randn(1, 2, 9, 8)
    more = {"scaling": 1.0, "is_causal": False}
    module = SimpleNamespace()
    wide = largest_logits(module, query.double(), key.double(), None, "sdpa", more)
    narrow = largest_logits(module, query.bfloat16(), key.bfloat16(), None, "sdpa", more)
    assert (narrow - wide).abs().max() < 0.1
    assert not narrow.eq(narrow.bfloat16()).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = logits_of(model, tokens)
    # Queries are rounded there, as the kernel has them; their products are not.
    assert not inside.float().eq(inside.bfloat16().float()).all()
    torch.testing.assert_close(inside, exact, rtol=0.05, atol=0)


def dense(query, key, mask):
    """The largest logits under a boolean mask."""
    logits = query @ key.transpose(2, 3)
    return logits.masked_fill(~mask, -torch.inf).amax(dim=(0, 2, 3))


FLASH = {
    "causal": ({}, lambda q, k: k <= q),
    "a window": ({"sliding_window": 3}, lambda q, k: (k <= q) & (q - k < 3)),
    "packed": (
        {"cu_seq_lens_q": torch.tensor([0, 4, 9])},
        lambda q, k: (k <= q) & ((q < 4) == (k < 4)),
    ),
    "packed, by positions": (
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
        lambda q, k: (k <= q) & ((q < 4) == (k < 4)),
    ),
    "both ways": ({"is_causal": False}, lambda q, k: k >= 0),
}


@pytest.mark.parametrize("case", FLASH)
def test_flash_attention_is_told_in_words_what_is_visible(case):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 9, 8, generator=generator).double()
    more, rule = FLASH[case]
    q, k = torch.arange(9)[:, None], torch.arange(9)
    module = SimpleNamespace(is_causal=True)
    more = {"scaling": 1.0, **more}
    found = largest_logits(module, query, key, None, "flash_attention_2", more)
    torch.testing.assert_close(found, dense(query, key, rule(q, k)))
    if case != "both ways":
        assert not found.equal(dense(query, key, torch.ones(9, 9, dtype=torch.bool)))
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    found = largest_logits(module, query, key, padding, "flash_attention_2", {"scaling": 1.0})
    torch.testing.assert_close(found, dense(query, key, (k <= q) & padding[0].bool()))


def test_flex_attention_has_a_mask_of_blocks():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 9, 8, generator=generator).double()
    block = create_block_mask(lambda b, h, q, k: (k <= q) & (k != 2), 1, None, 9, 9, device="cpu")
    found = largest_logits(SimpleNamespace(), query, key, block, "flex_attention", {"scaling": 1.0})
    q, k = torch.arange(9)[:, None], torch.arange(9)
    torch.testing.assert_close(found, dense(query, key, (k <= q) & (k != 2)))


def test_blocks_of_queries_give_the_same(monkeypatch, tokens):
    model = built("llama")
    (whole,) = logits_of(model, tokens)
    monkeypatch.setattr("hf_muon.integrations.attention_logits._LIMIT", 2 * 4 * 9 * 2)
    (in_blocks,) = logits_of(model, tokens)
    torch.testing.assert_close(in_blocks, whole)


def test_the_table_is_left_as_it_was(tokens):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as TABLE

    before, model = dict(vars(TABLE)), built("llama")
    expected = model(tokens).logits
    observer = LogitObserver(find_attentions(model))
    observer.open()
    observer.open()
    assert model(tokens).logits.equal(expected)
    assert vars(TABLE) != before
    observer.close()
    assert vars(TABLE) == before


REFUSED = {
    "qwen3": "q_norm normalizes queries or keys",
    "olmo2": "q_norm normalizes queries or keys",
    "gemma3_text": "q_norm normalizes queries or keys",
    "olmo": r"does not know how model\.layers\.0\.self_attn \(OlmoAttention\) makes",
    "bloom": "does not know how transformer.h.0.self_attention",
    "mamba": "found no attention whose queries and keys are trained",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        find_attentions(built(name))


def test_norms_that_are_a_setting():
    assert find_attentions(built("cohere", use_qk_norm=False))
    with pytest.raises(ValueError, match="q_norm normalizes"):
        find_attentions(built("cohere", use_qk_norm=True))


def test_frozen_attention_is_left_alone():
    model = built("llama", num_hidden_layers=2)
    model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj\.weight, which is frozen"):
        find_attentions(model)
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    assert [one.name for one in find_attentions(model)] == ["model.layers.1.self_attn"]
    with pytest.raises(ValueError, match="found no attention"):
        find_attentions(model.requires_grad_(False))


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"self_attn\.q_proj, which is a Linear and not a plain"):
        find_attentions(peft.get_peft_model(built("llama"), settings))
    settings = peft.LoraConfig(r=2, target_modules=["v_proj"])
    with pytest.raises(ValueError, match="found no attention"):  # queries and keys are frozen
        find_attentions(peft.get_peft_model(built("llama"), settings))


def test_flattened_weights_are_refused():
    model = built("llama")
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.detach().flatten())
    with pytest.raises(ValueError, match="is flattened, or cut for tensor parallelism"):
        find_attentions(model)
