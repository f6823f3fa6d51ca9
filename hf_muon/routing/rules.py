"""The rules that send a parameter to Muon or to AdamW: ordered, the first match wins.

In: a :class:`Context`, one trainable parameter with its surroundings. Out: a :class:`Decision` with
a reason. The rules look at owners, accessors and geometry first, at names last, and never at the
model type. Start reading at the table :data:`RULES`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hf_muon.config import MuonConfig
from hf_muon.routing import fused, heads, matrices
from hf_muon.routing.adapters import Adapter
from hf_muon.routing.matrices import Matrices
from hf_muon.routing.survey import EMBEDDINGS, Candidate, Survey

Algorithm = Literal["muon", "adamw"]

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Routers of mixtures of experts. A ForgetGate or a GatedMLP is not one.
ROUTER_CLASS = re.compile(r"Router(?:MLP|Linear)?$|Top[kK\d]+Gat(?:e|ing)$|Mo[Ee](?:V\d+)?Gate$")
EXPERT_CLASS = re.compile(r"Experts?$")
PROJECTOR_PATHS = ("projector", "multi_modal", "connector", "visual")


@dataclass(frozen=True)
class Context:
    """One trainable parameter, with the user's patterns for it, and what the rules may ask."""

    candidate: Candidate
    muon_pattern: str | None
    adamw_pattern: str | None
    adapter: Adapter | None
    survey: Survey
    config: MuonConfig

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.candidate.owner

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return self.candidate.shape

    @property
    def is_vector(self) -> bool:
        """Whether there are no two dimensions, or the last two have a single row or column."""
        return len(self.shape) < 2 or min(self.shape[-2:]) <= 1

    @property
    def is_flattened(self) -> bool:
        """Whether the parameter is a convolution kernel that the user wants flattened."""
        is_kernel = self.candidate.leaf == "weight" and isinstance(self.owner, CONVOLUTIONS)
        return self.config.conv == "flatten" and is_kernel


@dataclass(frozen=True)
class Decision:
    """Where a parameter goes, why, and as which matrices."""

    algorithm: Algorithm
    reason: str
    matrices: Matrices = ()


Rule = Callable[[Context], Decision | None]


def adamw(reason: str) -> Decision:
    """Send a parameter to AdamW."""
    return Decision("adamw", reason)


def decide(context: Context) -> Decision:
    """Return the decision of the first rule that makes one."""
    return next(found for rule in RULES if (found := rule(context)))  # the last takes everything


def shared_memory(context: Context) -> Decision | None:
    """Two parameters in one memory are both written; by one algorithm, as under any AdamW."""
    other = context.survey.sharing.get(id(context.candidate.parameter))
    if other and context.adamw_pattern is None and context.muon_pattern is not None:
        raise ValueError(
            f"muon_params holds {context.muon_pattern!r}, which matches {context.candidate.name}: "
            f"it shares its memory with {other}, and what is written twice goes to AdamW. Make "
            "them one parameter, or leave both out of muon_params."
        )
    return adamw(f"shared memory: also in {other}") if other else None


def user_override(context: Context) -> Decision | None:
    """The user's patterns come before kinds; those for AdamW make exceptions to those for Muon."""
    if context.adamw_pattern is not None:
        return adamw(f"user: adamw_params {context.adamw_pattern!r}")
    if context.muon_pattern is None:
        return None
    reason = f"user: muon_params {context.muon_pattern!r}"
    return Decision("muon", reason, forced_matrices(context))


def adapter(context: Context) -> Decision | None:
    """PEFT's container tells what an adapter tensor is, on any layer."""
    found = context.adapter
    if found is None:
        return None
    return Decision("muon" if found.matrices else "adamw", found.reason, found.matrices)


def embedding_or_head(context: Context) -> Decision | None:
    """One row per token. Found by identity, so a tied tensor is recognized under any name."""
    identity = id(context.candidate.parameter)
    if len(context.shape) < 2 or isinstance(context.owner, CONVOLUTIONS):
        return None  # a head's bias, an image's patch embedding: other rules decide
    if identity in context.survey.embeddings or isinstance(context.owner, EMBEDDINGS):
        tied = " (tied to the output head)" if identity in context.survey.heads else ""
        return adamw(f"embedding{tied}")
    return adamw("lm_head") if identity in context.survey.heads else None


def vector(context: Context) -> Decision | None:
    """Norms, biases, one-row gates: the polar factor of a vector is just its normalization."""
    return adamw("vector") if context.is_vector and not context.is_flattened else None


def convolution(context: Context) -> Decision | None:
    """A kernel is not one linear map; whether to flatten it is the user's choice."""
    if isinstance(context.owner, CONVOLUTIONS):
        return None if context.is_flattened else adamw("conv")
    if isinstance(context.owner, nn.utils.parametrize.ParametrizationList):
        return adamw("parametrized module")
    return None


def head(context: Context) -> Decision | None:
    """Task heads are outside the backbone, or have one row per label or token."""
    candidate, survey = context.candidate, context.survey
    if id(candidate.parameter) in survey.classifiers:
        return adamw("head: the model's classifier")
    if survey.in_stack(candidate) or any(
        word in step for step in candidate.path for word in PROJECTOR_PATHS
    ):
        return None
    if id(context.owner) in survey.outside_backbone:
        return adamw("head: outside the backbone")
    rows = getattr(context.owner, "out_channels", context.shape[0])
    if isinstance(context.owner, (nn.Linear, *CONVOLUTIONS)) and rows in survey.label_rows:
        return adamw("head: one row per token or label")
    return None


def router(context: Context) -> Decision | None:
    """A router has few rows, each with its own role: one per expert."""
    path, survey = context.candidate.path, context.survey
    # The owner or a module just above it. A router between whole models does not route to experts.
    by_class = any(
        ROUTER_CLASS.search(type(module).__name__) and not survey.holds_blocks(module)
        for module in context.candidate.modules[1:][-3:]
    )
    by_name = bool(path) and (path[-1] == "router" or path[-1].endswith("_router"))
    if by_class or by_name or (path and path[-1] == "gate" and _selects(context)):
        return adamw("router")
    return None


def _selects(context: Context) -> bool:
    """Whether a `gate` has a row per expert or, if unknown, far fewer rows than columns.

    `gate_proj` and square gates are ordinary linear maps.
    """
    rows, experts = context.shape[0], context.survey.experts
    return rows in experts if experts else rows * 4 <= context.shape[-1]


def bias_stack(context: Context) -> Decision | None:
    """(experts, n) looks like a matrix but is a list of vectors."""
    return adamw("bias stack") if context.candidate.leaf.endswith("bias") else None


def linear(context: Context) -> Decision | None:
    """A linear map."""
    if not is_linear_map(context):
        return None
    kind = "linear" if isinstance(context.owner, nn.Linear) else type(context.owner).__name__
    return hidden(context, kind)


def kernel(context: Context) -> Decision | None:
    """A kernel to be flattened; a depthwise one is a list of vectors."""
    if not context.is_flattened:
        return None
    found = matrices.flattened_kernel(context.owner, context.shape)
    if not found:  # depthwise: one filter per channel
        return adamw("conv, a vector for each group")
    return Decision("muon", "conv, flattened", found)


def experts(context: Context) -> Decision | None:
    """A stack of linear maps."""
    if len(context.shape) != 3 or not EXPERT_CLASS.search(type(context.owner).__name__):
        return None
    return hidden(context, "experts")


def unknown(context: Context) -> Decision | None:
    """Nothing declares what a raw parameter is; the report lists them."""
    return adamw(f"unknown: {context.candidate.leaf} of {type(context.owner).__name__}")


RULES: tuple[Rule, ...] = (
    shared_memory,
    user_override,
    adapter,
    embedding_or_head,
    vector,
    convolution,
    head,
    router,
    bias_stack,
    linear,
    kernel,
    experts,
    unknown,
)


def is_linear_map(context: Context) -> bool:
    """Whether the parameter is the weight of a layer that only computes x ↦ Wx."""
    owner, leaf = context.owner, context.candidate.leaf
    if len(context.shape) != 2:
        return False
    if isinstance(owner, nn.MultiheadAttention):
        return leaf in heads.RAW
    return leaf == "weight" and (
        isinstance(owner, nn.Linear) or matrices.columns_are_outputs(owner)
    )


def hidden(context: Context, kind: str) -> Decision:
    """A hidden weight: whole, one matrix per expert, or split into maps or heads on request."""
    projection = fused.projection_of(context.candidate)
    if context.config.split_heads and heads.is_of_heads(projection):
        cut = heads.split(projection)
        if cut is not None:
            reason = f"{kind}, per head: {projection.name} holds {len(cut)}"
            return Decision("muon", reason, cut)
        kind = f"{kind}, no heads declared: not split by them"
    if context.config.split_fused:
        cut = fused.split(projection)
        if cut is not None:
            return Decision("muon", f"{kind}, fused: {projection.name} is split", cut)
        if fused.LOOKS_FUSED.search(projection.name):
            kind = f"{kind}, looks fused: no layout declared, left whole"
            warnings.warn(
                f"split_fused: {context.candidate.name} looks like a fused projection, but no "
                f"layout is declared for {type(projection.user).__name__}.{projection.name}; it "
                "is orthogonalized as one matrix.",
                stacklevel=2,
            )
    return Decision("muon", kind, _uncut(context))


def forced_matrices(context: Context) -> Matrices:
    """Return the matrices of a parameter that the user sends to Muon; raise if it has none."""
    if context.adapter is not None and context.adapter.matrices:
        return context.adapter.matrices
    found: Matrices = ()
    if isinstance(context.owner, CONVOLUTIONS) and len(context.shape) > 2:
        found = matrices.flattened_kernel(context.owner, context.shape)
    elif not context.is_vector and len(context.shape) <= 3:
        if is_linear_map(context):
            return hidden(context, "linear").matrices
        found = _uncut(context)
    if not found:
        raise ValueError(
            f"muon_params {context.muon_pattern!r} names {context.candidate.name}, which has shape "
            f"{context.shape} and holds no matrix to orthogonalize. Muon takes linear weights, "
            "(experts, m, n) stacks and convolution kernels; narrow the pattern, or except the "
            "parameter through adamw_params."
        )
    return found


def _uncut(context: Context) -> Matrices:
    if len(context.shape) == 3:
        return matrices.stack(context.shape, matrices.expert_fan_out(context.owner))
    if is_linear_map(context):
        return matrices.whole(context.shape, int(matrices.columns_are_outputs(context.owner)))
    return matrices.whole(context.shape, None)
