"""Fused projections: several linear maps in one weight, and how each layout splits into them.

In: the module that uses the projection, the projection's name and its shape. Out: one matrix per
linear map, or None if no layout is declared. A layout is declared here after reading the forward
that splits the output; it is never guessed from shapes. Class names as of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from hf_muon.distributed.layout import Matrix
from hf_muon.routing.matrices import Matrices, columns_are_outputs, expert_fan_out, part
from hf_muon.routing.survey import Candidate

# Names that suggest several maps in one weight. They only decide whether a weight that has no
# declared layout deserves a warning.
LOOKS_FUSED = re.compile(
    r"qkv|query_key_value|c_attn$|gate_up|w_?pack|\bkv_proj|in_proj$|in_proj_weight$", re.IGNORECASE
)


@dataclass(frozen=True)
class Projection:
    """A weight that may be fused, as seen from the module whose forward splits its output."""

    user: nn.Module
    name: str
    shape: tuple[int, ...]
    fan_out_dim: int

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.shape[self.fan_out_dim]


@dataclass(frozen=True)
class Layout:
    """How the users of one projection arrange its linear maps.

    Attributes:
        name: Name of the projection.
        users: Classes whose forward splits its output in this way.
        split: Splits it.
        head_size: If the outputs are attention heads: the users' attribute for the size of one.
    """

    name: str
    users: frozenset[str]
    split: Callable[[Projection], Matrices]
    head_size: str | None = None


def projection_of(candidate: Candidate) -> Projection:
    """Return a weight as its parent (for a linear layer) or owner (a raw parameter) uses it."""
    shape, dim = candidate.shape, int(columns_are_outputs(candidate.owner))
    if candidate.leaf == "weight" and candidate.parent is not None:
        return Projection(candidate.parent, candidate.path[-1], shape, dim)
    return Projection(candidate.owner, candidate.leaf, shape, dim)


def split(projection: Projection) -> Matrices | None:
    """Return the linear maps of a fused projection, or None if no layout is declared."""
    if isinstance(projection.user, nn.MultiheadAttention):
        return thirds(projection) if projection.name == "in_proj_weight" else None
    if projection.name == "gate_up_proj" and hasattr(projection.user, "is_concatenated"):
        return expert_gate_up(projection)
    layout = layout_of(projection)
    return None if layout is None else layout.split(projection)


def layout_of(projection: Projection) -> Layout | None:
    """Return the declared layout of a projection, if any."""
    users = of_transformers(projection.user)
    found = (one for one in LAYOUTS if one.name == projection.name and users & one.users)
    return next(found, None)


def of_transformers(user: nn.Module) -> set[str]:
    """Return the names of those of a module's classes that belong to transformers.

    Base classes count, because FSDP2 replaces a module's class by a subclass. Other packages' do
    not, because a class of the same name may split its output differently.
    """
    return {
        cls.__name__
        for cls in type(user).__mro__
        if cls.__module__.startswith("transformers.models.")
    }


def blocks(projection: Projection, sizes: tuple[int, ...]) -> Matrices:
    """Return consecutive outputs of the given sizes: rows, or columns of a ``Conv1D``."""
    if sum(sizes) != projection.outputs:
        raise ValueError(
            f"{projection.name} of {type(projection.user).__name__} has shape "
            f"{projection.shape}, which does not hold outputs of sizes {sizes}. The declared "
            "layout does not fit this model; set split_fused=False."
        )
    return tuple(
        part(projection.shape, projection.fan_out_dim, sum(sizes[:index]), size)
        for index, size in enumerate(sizes)
    )


def of_size(projection: Projection, size: int) -> Matrices:
    """Return all outputs in blocks of one size."""
    return blocks(projection, (size,) * (projection.outputs // size))


def equal(count: int, projection: Projection) -> Matrices:
    """Split into ``count`` consecutive maps of equal size."""
    return blocks(projection, (projection.outputs // count,) * count)


halves, thirds = partial(equal, 2), partial(equal, 3)


def of_embedding_size(projection: Projection) -> Matrices:
    """GPT-2: maps of ``split_size`` outputs (three; two under cross-attention)."""
    return of_size(projection, int(projection.user.split_size))  # type: ignore[arg-type]


def grouped_query(projection: Projection) -> Matrices:
    """Rows [query; key; value], with fewer heads for key and value."""
    config, head_dim = projection.user.config, int(projection.user.head_dim)  # type: ignore[arg-type]
    query = int(config.num_attention_heads) * head_dim  # type: ignore[union-attr, arg-type]
    key = int(config.num_key_value_heads) * head_dim  # type: ignore[union-attr, arg-type]
    return blocks(projection, (query, key, key))


def per_head(head_size: str, projection: Projection) -> Matrices:
    """Rows ordered by head, each head with its query, key and value."""
    head_dim = int(getattr(projection.user, head_size))
    rows, cols = projection.shape
    shape, strides = (rows // (3 * head_dim), head_dim, cols), (3 * head_dim * cols, cols, 1)
    return tuple(Matrix(which * head_dim * cols, shape, strides, 0) for which in range(3))


def gate_up_columns(projection: Projection) -> Matrices:
    """Llama 4: each expert is (in, [gate, up])."""
    return _expert_halves(projection.shape, dim=1, interleaved=False)


def expert_gate_up(projection: Projection) -> Matrices | None:
    """Experts that declare through transformers' decorator how gate and up are stored."""
    dim = expert_fan_out(projection.user)
    if dim is None or len(projection.shape) != 3 or not getattr(projection.user, "has_gate", True):
        return None
    interleaved = not projection.user.is_concatenated
    return _expert_halves(projection.shape, dim, interleaved=interleaved)


def _expert_halves(shape: tuple[int, ...], dim: int, *, interleaved: bool) -> Matrices:
    experts, rows, cols = shape
    size = (rows, cols)[dim] // 2
    starts, step = ((0, 1), 2) if interleaved else ((0, size), 1)
    return tuple(
        part((rows, cols), dim, start, size, step=step, offset=e * rows * cols)
        for e in range(experts)
        for start in starts
    )


def classes(names: str) -> frozenset[str]:
    """Names of classes that are written one after the other."""
    return frozenset(names.split())


LAYOUTS = (
    Layout(
        "c_attn",
        classes("GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention"),
        of_embedding_size,
        "head_dim",
    ),
    Layout("qkv_proj", classes("Phi3Attention Phi4MultimodalAttention"), grouped_query, "head_dim"),
    Layout(
        "gate_up_proj",
        classes(
            "Phi3MLP Phi4MultimodalMLP GlmMLP Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmOcrTextMLP"
        ),
        halves,
    ),
    Layout(
        "query_key_value", classes("GPTNeoXAttention"), partial(per_head, "head_size"), "head_size"
    ),
    Layout("query_key_value", classes("BloomAttention"), partial(per_head, "head_dim"), "head_dim"),
    Layout(
        "qkv",
        classes(
            "VisionAttention Qwen2_5_VLVisionAttention "
            "Qwen3VLVisionAttention Qwen3VLMoeVisionAttention Glm4vVisionAttention"
        ),
        thirds,
        "head_dim",
    ),
    Layout("gate_up_proj", classes("Llama4TextExperts"), gate_up_columns),
    Layout("in_proj", classes("MambaMixer FalconMambaMixer JambaMambaMixer"), halves),
)
