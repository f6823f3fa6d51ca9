"""The attention modules whose logits can be bounded, and how to scale their projections.

In: a model, and a bound γ ≤ 1 for each head, by which its logits are to be multiplied. Out: the
modules in the model's order, and a multiplier for each output of their projections. Modules are
declared by class, after reading their forward; any other trained attention is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_muon.routing.fused import classes, of_transformers
from hf_muon.routing.heads import number
from hf_muon.routing.matrices import columns_are_outputs
from hf_muon.routing.survey import named_modules, shape_of

Factors = dict[str, Tensor]

_ATTENTION = re.compile(r"Attention|MLA$")
_NORM = re.compile(r"^(?:q|k|qk|query|key)_?(?:layer_?)?(?:norm|ln)$")
_REMEDY = "Remove QKClip from the callbacks, or freeze this module."


@dataclass(frozen=True)
class Layout:
    """How a class of attention modules computes its logits.

    Attributes:
        users: Names of the classes (transformers 5.23).
        projections: Names of the linear layers to scale, where a module has them.
        factors: Given the module and γ of each head, one multiplier per output of each layer.
    """

    users: frozenset[str]
    projections: tuple[str, ...]
    factors: Callable[[nn.Module, Tensor], Factors]


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention module whose logits can be bounded."""

    name: str
    module: nn.Module
    layout: Layout

    @property
    def heads(self) -> int:
        """Number of query heads."""
        if self.layout.factors is separate:
            query = self.module.get_submodule("q_proj")
            return outputs(query) // _required(self.module, "head_dim")
        return _required(self.module, "num_heads", "num_attention_heads")

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The linear layers to scale."""
        found = {part: getattr(self.module, part, None) for part in self.layout.projections}
        return {part: one for part, one in found.items() if isinstance(one, nn.Module)}

    @property
    def is_trained(self) -> bool:
        """Whether one of these layers is trained."""
        return any(p.requires_grad for one in self.projections.values() for p in one.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return next(iter(self.projections.values())).weight.dtype  # type: ignore[return-value]

    def factors(self, gamma: Tensor) -> Factors:
        """Return one multiplier per output of each projection, for γ of each head, (heads,)."""
        return self.layout.factors(self.module, gamma)


def separate(module: nn.Module, gamma: Tensor) -> Factors:
    """Separate query and key projections; a key head may serve a group of query heads."""
    size = _required(module, "head_dim")
    query, key = _shared(gamma, outputs(module.get_submodule("k_proj")) // size)
    return {"q_proj": query.repeat_interleave(size), "k_proj": key.repeat_interleave(size)}


def rows_in_turn(module: nn.Module, gamma: Tensor) -> Factors:
    """Phi-3: rows [query; key; value]."""
    size, total = _required(module, "head_dim"), outputs(module.get_submodule("qkv_proj"))
    query, key = _shared(gamma, (total // size - len(gamma)) // 2)
    scaled = torch.cat((query, key)).repeat_interleave(size)
    return {"qkv_proj": _padded(scaled, total)}


def columns_in_turn(module: nn.Module, gamma: Tensor) -> Factors:
    """GPT-2: columns [query; key; value]."""
    root = gamma.sqrt().repeat_interleave(_required(module, "head_dim"))
    return {"c_attn": _padded(torch.cat((root, root)), outputs(module.get_submodule("c_attn")))}


def interleaved(module: nn.Module, gamma: Tensor) -> Factors:
    """GPT-NeoX: rows ordered by head, each head with query, key and value."""
    root = gamma.sqrt()
    each = torch.stack((root, root, torch.ones_like(root)), dim=1)  # (heads, 3)
    return {"query_key_value": each.flatten().repeat_interleave(_required(module, "head_size"))}


def latent(module: nn.Module, gamma: Tensor) -> Factors:
    """DeepSeek: all heads share the rotated key, so the rotated query takes all of γ.

    The latent vectors are normalized before q_b_proj and kv_b_proj, whose rows are scaled.
    """
    root, one = gamma.sqrt(), torch.ones_like(gamma)
    without, rotated = _required(module, "qk_nope_head_dim"), _required(module, "qk_rope_head_dim")
    query = _parts((root, without), (gamma, rotated))
    key_value = _parts((root, without), (one, _required(module, "v_head_dim")))
    name = "q_proj" if getattr(module, "q_proj", None) is not None else "q_b_proj"
    return {name: query, "kv_b_proj": key_value}


def _shared(gamma: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    """Return multipliers of query heads and key heads: γ/√γ_min and √γ_min of each group."""
    smallest = gamma.view(key_heads, -1).amin(dim=1).sqrt()
    return gamma / smallest.repeat_interleave(len(gamma) // key_heads), smallest


def _parts(*parts: tuple[Tensor, int]) -> Tensor:
    """For each head in turn, repeat each multiplier for the outputs of its part."""
    return torch.cat([f[:, None].expand(-1, size) for f, size in parts], dim=1).flatten()


def _padded(factors: Tensor, total: int) -> Tensor:
    """Pad multipliers with ones: values are not scaled."""
    return torch.cat((factors, factors.new_ones(total - len(factors))))


LAYOUTS = (
    Layout(
        classes(
            "ArceeAttention BambaAttention CohereAttention DiffLlamaAttention Ernie4_5Attention "
            "Gemma2Attention GemmaAttention Glm4Attention GlmAttention GptOssAttention "
            "GraniteAttention GraniteMoeAttention HeliumAttention JambaAttention LlamaAttention "
            "MinistralAttention MistralAttention MixtralAttention NemotronAttention PhiAttention "
            "PhimoeAttention Qwen2Attention Qwen2MoeAttention SeedOssAttention SmolLM3Attention "
            "StableLmAttention Starcoder2Attention"
        ),
        ("q_proj", "k_proj"),
        separate,
    ),
    Layout(classes("Phi3Attention"), ("qkv_proj",), rows_in_turn),
    Layout(classes("GPT2Attention"), ("c_attn",), columns_in_turn),
    Layout(classes("GPTNeoXAttention"), ("query_key_value",), interleaved),
    Layout(
        classes("DeepseekV2Attention DeepseekV3Attention Glm4MoeLiteAttention YoutuAttention"),
        ("q_proj", "q_b_proj", "kv_b_proj"),
        latent,
    ),
)


def find_attentions(model: nn.Module) -> list[Attention]:
    """Return the attention modules of a model whose queries or keys are trained.

    Raises:
        ValueError: A trained module normalizes queries or keys, is of an unknown class, or has
            adapters, frozen parts or parts on other ranks in the weights to scale; or there is
            nothing to bound.
    """
    found = [one for name, module in _modules(model) if (one := _attention(name, module))]
    if not found:
        raise ValueError(
            "QKClip found no attention whose queries and keys are trained, so that it would do "
            "nothing. Remove it from the callbacks."
        )
    return found


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the innermost attention modules that train something, with their names."""
    for _, name, module in named_modules(model):
        inside = [m for m in module.modules() if _ATTENTION.search(type(m).__name__)]
        if inside == [module] and any(p.requires_grad and p.ndim for p in module.parameters()):
            yield name, module


def _attention(name: str, module: nn.Module) -> Attention | None:
    kind = f"{name} ({type(module).__name__})"
    users = of_transformers(module)
    found = next((Attention(name, module, one) for one in LAYOUTS if users & one.users), None)
    if found is not None and not found.is_trained:
        return None
    norms = [child for child, _ in module.named_children() if _NORM.match(child)]
    if norms:
        raise ValueError(
            f"QKClip cannot scale the logits of {kind}: {norms[0]} normalizes queries or keys, so "
            "that the scale of their weights has no effect, and the logits are bounded already. "
            "Remove QKClip from the callbacks."
        )
    if found is None or getattr(module, "is_cross_attention", False):
        raise ValueError(
            f"QKClip does not know how {kind} makes queries and keys of its weights. {_REMEDY}"
        )
    for part, projection in found.projections.items():
        _check_projection(f"{name}.{part}", projection)
    return found


def _required(module: nn.Module, *names: str) -> int:
    found = number(module, *names)
    assert found is not None, names  # the classes of LAYOUTS have them
    return found


def outputs(projection: nn.Module) -> int:
    """Return the number of outputs of a linear layer, wherever its weight is."""
    size: int = getattr(projection, "nf" if columns_are_outputs(projection) else "out_features")
    return size


def _check_projection(name: str, projection: nn.Module) -> None:
    linear = isinstance(projection, nn.Linear) or columns_are_outputs(projection)
    if not linear or "weight" not in projection._parameters:
        raise ValueError(
            f"QKClip scales the rows of {name}, which is a {type(projection).__name__} and not a "
            f"plain linear layer: rows of an adapter or of a parametrization are not. {_REMEDY}"
        )
    dim = int(columns_are_outputs(projection))
    for part, parameter in projection.named_parameters(recurse=False):
        if not parameter.requires_grad:
            raise ValueError(
                f"QKClip would have to scale {name}.{part}, which is frozen, while other weights "
                f"of the same logits are trained. {_REMEDY}"
            )
        shape = shape_of(parameter)
        whole = len(shape) == (2 if part == "weight" else 1)
        if not whole or shape[dim if part == "weight" else 0] != outputs(projection):
            raise ValueError(
                f"QKClip cannot find the rows of {name}.{part}, which has shape {shape} here: it "
                "is flattened, or cut for tensor parallelism. Use DDP, FSDP version 2 or ZeRO."
            )
