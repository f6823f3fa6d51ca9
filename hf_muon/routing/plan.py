"""The plan: what was decided for every trainable parameter, and the param groups that follow.

In: a model and a :class:`~hf_muon.config.MuonConfig`. Out: a :class:`RoutePlan` with one
:class:`Route` per parameter; it prints as a table, exports to JSON, has a fingerprint that tells
two routings apart, and makes the optimizer's param groups.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_muon.config import LoraUpdate, MuonConfig
from hf_muon.distributed.layout import Matrix
from hf_muon.routing.adapters import Adapter, Factor, adapters
from hf_muon.routing.groups import param_groups, plain
from hf_muon.routing.rules import Algorithm, Context, Decision, Overrides, decide
from hf_muon.routing.survey import Candidate, Survey, survey
from hf_muon.routing.table import render

logger = logging.getLogger(__name__)

# What Trainer.get_decay_parameter_names excludes from weight decay (transformers 5.23).
UNDECAYED_LAYERS = [nn.LayerNorm]
UNDECAYED_NAMES = [
    r"bias",
    r"layernorm",
    r"rmsnorm",
    r"(?:^|\.)norm(?:$|\.)",
    r"_norm(?:$|\.)",
]


@dataclass(frozen=True)
class Route:
    """What was decided for one parameter.

    Attributes:
        name: Name in the model, clean of wrappers.
        shape: Whole shape.
        algorithm: ``muon`` or ``adamw``.
        reason: Why; the part before the first colon or comma is the kind.
        matrices: What Muon orthogonalizes; empty under AdamW.
        decay: Whether weight decay applies, by the Trainer's own rule.
        pair: Name of the partner, for a LoRA factor whose partner is trained by Muon as well.
        scaling: c of W₀ + cBA, for a LoRA factor.
        factor: ``A`` or ``B``, for a LoRA factor.
        lora_update: How a LoRA factor is updated: the setting, or ``factor`` where that cannot be.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: Algorithm
    reason: str
    matrices: tuple[Matrix, ...] = ()
    decay: bool = True
    pair: str | None = None
    scaling: float | None = None
    factor: Factor | None = None
    lora_update: LoraUpdate | None = None

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """The first words of the reason."""
        return re.split("[:,(]", self.reason)[0].strip()


@dataclass(frozen=True)
class RoutePlan:
    """One route for each trainable parameter, in the order of ``named_parameters()``.

    Attributes:
        routes: One for each trainable parameter.
        parameters: The parameters themselves, in the same order; empty in a plan without a model.
        frozen: Number of parameters that are not trained.
        remedy: Why nothing went to Muon and what to do, where that is known; else empty.
    """

    routes: tuple[Route, ...]
    parameters: tuple[nn.Parameter, ...] = field(repr=False, compare=False, default=())
    frozen: int = 0
    remedy: str = field(repr=False, compare=False, default="")

    @property
    def fingerprint(self) -> str:
        """Short hash over names, shapes, algorithms and matrices."""
        facts = [(r.name, r.shape, r.algorithm, r.matrices) for r in self.routes]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def muon(self) -> tuple[Route, ...]:
        """The routes that go to Muon."""
        return tuple(route for route in self.routes if route.algorithm == "muon")

    @property
    def adamw(self) -> tuple[Route, ...]:
        """The routes that go to AdamW."""
        return tuple(route for route in self.routes if route.algorithm == "adamw")

    def totals(self) -> dict[str, int]:
        """Counts of tensors, matrices and elements."""
        return {
            "muon_tensors": len(self.muon),
            "muon_matrices": sum(len(route.matrices) for route in self.muon),
            "muon_parameters": sum(route.numel for route in self.muon),
            "adamw_tensors": len(self.adamw),
            "adamw_parameters": sum(route.numel for route in self.adamw),
            "frozen_tensors": self.frozen,
        }

    def table(self, *, compact: bool | None = None) -> str:
        """The plan as text.

        Args:
            compact: Fold the numbered layers of a stack into one line. Default: only where there
                are more than 100 parameters.
        """
        return render(self, compact=len(self.routes) > 100 if compact is None else compact)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return {
            "fingerprint": self.fingerprint,
            "totals": self.totals(),
            "routes": [
                {
                    "name": route.name,
                    "shape": list(route.shape),
                    "algorithm": route.algorithm,
                    "reason": route.reason,
                    "matrices": [plain(matrix) for matrix in route.matrices],
                    "decay": route.decay,
                    "pair": route.pair,
                    "scaling": route.scaling,
                    "factor": route.factor,
                    "lora_update": route.lora_update,
                }
                for route in self.routes
            ],
        }

    def require_matrices(self) -> None:
        """Raise where nothing goes to Muon, with the cause.

        Raises:
            ValueError: No parameter was routed to Muon.
        """
        if self.muon:
            return
        if self.remedy:
            raise ValueError(self.remedy)
        if not self.routes:
            raise ValueError(
                f"Nothing to train with Muon: all {self.frozen} parameters are frozen. Set "
                "requires_grad, or attach an adapter, before the optimizer is made."
            )
        kinds = ", ".join(sorted({route.kind for route in self.routes}))
        raise ValueError(
            f"Nothing to train with Muon: all {len(self.routes)} trainable parameters went to "
            f"AdamW ({kinds}). Use a stock AdamW, or name matrices through muon_params."
        )

    def param_groups(self, config: MuonConfig) -> list[dict[str, Any]]:
        """The optimizer's groups: Muon first, then AdamW; decayed first; none empty.

        Parameters of different device meshes get different groups; so do pairs of LoRA factors
        that move together and other matrices.

        Args:
            config: Gives the hyper-parameters of both halves.

        Returns:
            Groups with ``params`` as ``(name, parameter)`` pairs. Muon groups hold ``matrices``,
            aligned with ``params``: for each a tuple of ``(offset, shape, strides, fan_out_dim)``;
            and where there are LoRA factors ``pairs``, ``factors`` and ``scalings``, aligned as
            well: the name of the partner, ``A`` or ``B``, and c. They are empty or 0 for others.

        Raises:
            ValueError: No parameter was routed to Muon.
        """
        self.require_matrices()
        _log_fallbacks(self.muon, config.lora_update)
        bound = list(zip(self.routes, self.parameters, strict=True))
        return param_groups(bound, config)


def route(model: nn.Module, config: MuonConfig | None = None) -> RoutePlan:
    """Decide for every trainable parameter of a model.

    Args:
        model: Any module; wrapped by DDP, ``torch.compile`` or PEFT as well.
        config: Gives ``muon_params``, ``adamw_params`` and ``split_fused``. Default: none.

    Returns:
        The plan. It may have an empty Muon half; :meth:`RoutePlan.param_groups` refuses that.

    Raises:
        ValueError: A pattern matches nothing, or sends something without matrices to Muon.
    """
    config = MuonConfig() if config is None else config
    facts, of_adapters = survey(model), adapters(model)
    overrides = Overrides(
        muon=_matched("muon_params", config.muon_params, facts),
        adamw=_matched("adamw_params", config.adamw_params, facts),
    )
    decisions = [
        decide(Context(c, facts, of_adapters.get(id(c.parameter)), overrides, config.split_fused))
        for c in facts.candidates
    ]
    names = {
        id(candidate.parameter): candidate.name
        for candidate, decision in zip(facts.candidates, decisions, strict=True)
        if decision.algorithm == "muon"
    }
    decayed = _decayed_names(model)

    def finished(candidate: Candidate, decision: Decision) -> Route:
        made = Route(
            name=candidate.name,
            shape=candidate.shape,
            algorithm=decision.algorithm,
            reason=decision.reason,
            matrices=decision.matrices,
            decay=candidate.raw_name in decayed,
        )
        adapter = of_adapters.get(id(candidate.parameter))
        if adapter is None or adapter.factor is None or decision.algorithm != "muon":
            return made
        return _of_factor(made, adapter, names.get(id(adapter.partner)), config.lora_update)

    routes = tuple(map(finished, facts.candidates, decisions))
    if config.lora_update != "factor" and not any(route.factor for route in routes):
        raise ValueError(
            f"lora_update={config.lora_update!r} is for LoRA factors, and Muon trains none in this "
            "model. Attach an adapter of rank 2 or more before the optimizer is made, or use "
            "lora_update='factor'."
        )
    return RoutePlan(
        routes=routes,
        parameters=tuple(candidate.parameter for candidate in facts.candidates),
        frozen=facts.frozen,
        remedy=_flat_parameters(model),
    )


def _of_factor(made: Route, adapter: Adapter, pair: str | None, lora_update: LoraUpdate) -> Route:
    """The route of a LoRA factor, with the reason if it is updated otherwise than asked for."""
    obstacle = ""
    if lora_update != "factor" and adapter.is_dora:
        obstacle = "DoRA normalizes W + cBA"
    elif lora_update != "factor" and pair is None:
        obstacle = "Muon does not train its partner"
    return dataclasses.replace(
        made,
        reason=f"{made.reason}{_ON_ITS_OWN}{obstacle}" if obstacle else made.reason,
        pair=pair,
        scaling=adapter.scaling,
        factor=adapter.factor,
        lora_update="factor" if obstacle else lora_update,
    )


_ON_ITS_OWN = ", lora_update='factor' because "


def _log_fallbacks(routes: Iterable[Route], lora_update: LoraUpdate) -> None:
    """Say how many LoRA factors are updated otherwise than asked for, and why."""
    alone = [r for r in routes if r.factor and r.lora_update != lora_update]
    obstacles = Counter(r.reason.rpartition(_ON_ITS_OWN)[2] for r in alone)
    for obstacle, count in obstacles.items():
        logger.warning(
            "lora_update=%r: %d LoRA factors are updated one by one (lora_update='factor'), "
            "because %s.",
            lora_update,
            count,
            obstacle,
        )


def _decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that the Trainer would decay."""
    from transformers.trainer_pt_utils import get_parameter_names

    names = get_parameter_names(model, UNDECAYED_LAYERS, UNDECAYED_NAMES)  # type: ignore[no-untyped-call]
    return set(names)


def _flat_parameters(model: nn.Module) -> str:
    """FSDP1 hands the optimizer pieces of flattened parameters, whose matrices are gone."""
    if not any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return ""
    return (
        "The model is wrapped by FSDP version 1, which flattens matrices into vectors. Use FSDP "
        "version 2 (fsdp_version: 2 in the accelerate or fsdp_config), which keeps them."
    )


def _matched(field_name: str, patterns: Iterable[str], facts: Survey) -> dict[str, str]:
    """The first pattern that matches each name; a pattern that matches none is an error."""
    names = [candidate.name for candidate in facts.candidates]
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = [name for name in names if re.search(pattern, name)]
        if not matches:
            raise ValueError(_no_match(field_name, pattern, names, facts.aliases))
        for name in matches:
            found.setdefault(name, pattern)
    return found


def _no_match(field_name: str, pattern: str, names: list[str], aliases: dict[str, str]) -> str:
    message = f"{field_name} holds {pattern!r}, which matches no trainable parameter."
    for alias, name in aliases.items():
        if re.search(pattern, alias):
            return f"{message} {alias} is tied: the tensor is trained as {name}."
    words = sorted({step for name in names for step in name.split(".")} | set(names))
    near = difflib.get_close_matches(pattern.strip("^$."), words, n=3, cutoff=0.5)
    return f"{message} Near names: {', '.join(near)}." if near else message


def state_bytes(plan: RoutePlan, config: MuonConfig) -> dict[str, int]:
    """Bytes of optimizer state under the plan, and under AdamW alone.

    Muon keeps what its rule does: one buffer per matrix, none in ``polar_only``; AdamW two; both a
    step counter of four bytes per tensor.
    """
    muon, adamw, reference = 0, 0, 0
    for one, parameter in zip(plan.routes, plan.parameters, strict=True):
        both = 2 * one.numel * parameter.element_size()
        reference += both + 4
        if one.algorithm == "adamw":
            adamw += both + 4
            continue
        chosen = config.momentum_dtype
        dtype = parameter.dtype if chosen is None else getattr(torch, chosen)
        rows = len(one.matrices) * max(matrix.rows for matrix in one.matrices)
        muon += 4 + sum(
            rows * (buffer.dtype or torch.float32).itemsize
            if buffer.kind == "rows"
            else one.numel * (buffer.dtype or dtype).itemsize
            for buffer in config.rule.buffers
        )
    return {"muon": muon, "adamw": adamw, "total": muon + adamw, "adamw_only": reference}
