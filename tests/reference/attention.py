"""Attention logits in float64, from weights and hidden states alone.

The layers' inputs come from the model; queries, keys, rotation and mask are computed here.
"""

import copy

import torch


def largest_logits(model, tokens, visible=None):
    """S_h of each layer of a LLaMA or a DeepSeek-V3, (layers, heads).

    ``visible`` is a boolean mask, (batch, 1, tokens, tokens); default: causal.
    """
    model = copy.deepcopy(model).double().eval()
    inputs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        model(tokens, attention_mask=None if visible is None else visible[:, 0, -1].long())
        length = tokens.shape[1]
        if visible is None:
            visible = torch.ones(length, length, dtype=torch.bool).tril()
        found = []
        for layer, x in zip(model.model.layers, inputs, strict=True):
            latent = hasattr(layer.self_attn, "kv_b_proj")
            query, key = (_of_latent if latent else _of_llama)(layer.self_attn, x)
            logits = torch.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
            found.append(logits.masked_fill(~visible, -torch.inf).amax(dim=(0, 2, 3)))
    return torch.stack(found)


def _turned(pairs, theta=10000.0):
    """Complex numbers, (batch, tokens, heads, size / 2), turned by their places."""
    _, length, _, half = pairs.shape
    angles = torch.arange(length).double()[:, None] / theta ** (torch.arange(half) / half)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def _linear(layer, x):
    out = x @ layer.weight.T
    return out if layer.bias is None else out + layer.bias


def _of_llama(attention, x):
    def heads(projection):
        y = _linear(projection, x).unflatten(-1, (-1, attention.head_dim))
        real, imaginary = y.chunk(2, dim=-1)
        return _turned(torch.complex(real, imaginary))

    query, key = heads(attention.q_proj), heads(attention.k_proj)
    return query, key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)


def _of_latent(attention, x):
    without, rotated = attention.qk_nope_head_dim, attention.qk_rope_head_dim

    def turned(y):  # stored as pairs
        pairs = y.unflatten(-1, (-1, 2))
        return _turned(torch.complex(pairs[..., 0], pairs[..., 1]))

    if attention.q_lora_rank is None:
        query = _linear(attention.q_proj, x)
    else:
        query = _linear(attention.q_b_proj, attention.q_a_layernorm(_linear(attention.q_a_proj, x)))
    query = query.unflatten(-1, (attention.num_heads, without + rotated))
    latent, shared = _linear(attention.kv_a_proj_with_mqa, x).split(
        [attention.kv_lora_rank, rotated], dim=-1
    )
    latent = _linear(attention.kv_b_proj, attention.kv_a_layernorm(latent))
    key = latent.unflatten(-1, (attention.num_heads, -1))[..., :without]
    shared = turned(shared[:, :, None]).expand(-1, -1, attention.num_heads, -1)
    query = torch.cat((query[..., :without], turned(query[..., without:])), dim=-1)
    return query, torch.cat((key, shared), dim=-1)
