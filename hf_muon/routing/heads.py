"""Attention heads: which outputs of a projection belong to one head.

In: a projection as :mod:`hf_muon.routing.fused` describes it. Out: one matrix per head of its
queries, keys or values, or None if the architecture declares no heads. Heads are what a module or
its configuration declares, and only if the rows fit; they are never guessed from shapes.
"""

from __future__ import annotations

from torch import nn

from hf_muon.routing.fused import Projection, layout_of, of_size, of_transformers
from hf_muon.routing.matrices import Matrices

QUERIES = ("q_proj", "q_attn", "query", "query_proj", "q_lin", "q")
KEYS_AND_VALUES = (
    *("k_proj", "key", "key_proj", "k_lin", "k"),
    *("v_proj", "value", "value_proj", "v_lin", "v"),
)
# The raw parameters of nn.MultiheadAttention.
RAW = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

# The names of these numbers in transformers' modules and configurations (5.23).
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_KEY_HEADS = ("num_key_value_heads", *_HEADS)
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")


def split(projection: Projection) -> Matrices | None:
    """Return one matrix per head, or None if the architecture declares no heads."""
    if len(projection.shape) != 2:
        return None
    size = head_size(projection)
    if size is None or size < 2 or projection.outputs % size:  # a single row is a vector
        return None
    return of_size(projection, size)


def is_of_heads(projection: Projection) -> bool:
    """Whether the name says that the outputs are queries, keys or values."""
    named = (*QUERIES, *KEYS_AND_VALUES, "q_b_proj", "kv_b_proj", "c_attn", "qkv", "qkv_proj")
    return projection.name in (*named, *RAW, "query_key_value")


def head_size(projection: Projection) -> int | None:
    """Return how many consecutive outputs of a projection form one head, if it is known."""
    user, name = projection.user, projection.name
    if isinstance(user, nn.MultiheadAttention):
        return user.head_dim if name in RAW else None
    if not of_transformers(user):
        return None
    layout = layout_of(projection)
    if layout is not None:  # query, key and value heads have one size, in whatever order
        return None if layout.head_size is None else number(user, layout.head_size)
    if number(user, "qk_nope_head_dim") is not None:
        return _latent_head_size(projection)
    if name not in (*QUERIES, *KEYS_AND_VALUES):
        return None
    heads = number(user, *(_HEADS if name in QUERIES else _KEY_HEADS))
    return _fitting(projection, heads, number(user, *_SIZES))


def _latent_head_size(projection: Projection) -> int | None:
    """Multi-head latent attention: a head of the query, or of the unrotated key and the value."""
    user, heads = projection.user, number(projection.user, *_HEADS)
    without = number(user, "qk_nope_head_dim") or 0
    if projection.name in ("q_proj", "q_b_proj"):
        return _fitting(projection, heads, without + (number(user, "qk_rope_head_dim") or 0))
    if projection.name == "kv_b_proj":
        return _fitting(projection, heads, without + (number(user, "v_head_dim") or 0))
    return None


def _fitting(projection: Projection, heads: int | None, size: int | None) -> int | None:
    """Return the size of a head if that many heads make up all outputs, else None.

    They do not if a projection holds something besides heads, such as a gate.
    """
    if not heads or projection.outputs % heads:
        return None
    per_head = projection.outputs // heads
    return per_head if size in (None, per_head) else None


def number(user: nn.Module, *names: str) -> int | None:
    """Return the first of some numbers that a module, or else its configuration, has."""
    for holder in (user, getattr(user, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
