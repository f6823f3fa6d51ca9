"""The routing plan: the decision for every trainable parameter, and the resulting param groups.

In: a model and a :class:`~hf_muon.config.MuonConfig`. Out: a :class:`RoutePlan` with one
:class:`Route` per parameter. It prints as a table, exports to JSON, has a fingerprint that tells
two routings apart, and builds the optimizer's param groups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed import get_node_local_rank

from hf_muon.config import LoraUpdate, MuonConfig
from hf_muon.routing.adapters import OF_RANK_ONE, Adapter, adapters
from hf_muon.routing.route import Route, param_groups, with_routing
from hf_muon.routing.rules import Context, Decision, decide
from hf_muon.routing.survey import WRAPPERS, Survey, survey, trainable
from hf_muon.routing.table import render
from hf_muon.rules import kept_by
from hf_muon.values import near

logger = logging.getLogger(__name__)

# What Trainer.get_decay_parameter_names excludes from weight decay (transformers 5.23).
UNDECAYED_LAYERS = [nn.LayerNorm]
UNDECAYED_NAMES = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


@dataclass(frozen=True)
class RoutePlan:
    """One route for each trainable parameter, in the order of ``named_parameters()``.

    Attributes:
        routes: One for each trainable parameter.
        parameters: The parameters themselves, in the same order; empty in a plan without a model.
        frozen: Number of parameters that are not trained.
        remedy: Why nothing went to Muon and what to do about it, if known; else empty.
        headless: Whether no output layer was recognized in a model that may have one.
        config: The settings that the parameters were routed with.
    """

    routes: tuple[Route, ...]
    parameters: tuple[nn.Parameter, ...] = field(repr=False, compare=False, default=())
    frozen: int = 0
    remedy: str = field(repr=False, compare=False, default="")
    headless: bool = field(repr=False, compare=False, default=False)
    config: MuonConfig = field(repr=False, compare=False, default_factory=MuonConfig)

    @property
    def fingerprint(self) -> str:
        """Short hash of names, shapes, algorithms and matrices."""
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
        """Numbers of tensors, matrices and elements."""
        return {
            "muon_tensors": len(self.muon),
            "muon_matrices": sum(len(route.matrices) for route in self.muon),
            "muon_parameters": sum(route.numel for route in self.muon),
            "adamw_tensors": len(self.adamw),
            "adamw_parameters": sum(route.numel for route in self.adamw),
            "frozen_tensors": self.frozen,
        }

    def table(self, *, compact: bool | None = None) -> str:
        """Return the plan as text.

        Args:
            compact: Fold the numbered layers of a stack into one line. Default: only if there are
                more than 100 parameters.
        """
        compact = len(self.routes) > 100 if compact is None else compact
        return render(self.routes, self.totals(), self.fingerprint, compact=compact)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {
            "fingerprint": self.fingerprint,
            "totals": self.totals(),
            "routes": [route.to_dict() for route in self.routes],
        }

    def fits(self, model: nn.Module) -> bool:
        """Whether the model's trainable parameters are still those that were routed."""
        return [id(p) for _, p in trainable(model)] == [id(p) for p in self.parameters]

    def only(self, names: Container[str]) -> RoutePlan:
        """Return the plan of some of the parameters."""
        kept = [n for n, one in enumerate(self.routes) if one.name in names]
        return dataclasses.replace(
            self,
            routes=tuple(self.routes[n] for n in kept),
            parameters=tuple(self.parameters[n] for n in kept),
        )

    def require_matrices(self) -> None:
        """Raise if nothing goes to Muon, with the cause.

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
        kinds = sorted({route.kind for route in self.routes})
        if any(OF_RANK_ONE in route.reason for route in self.routes):
            hint = "Rank-1 factors are vectors, which have no polar factor: use r ≥ 2."
        elif "conv" in kinds:
            hint = (
                "muon_params names kernels that Muon should train, flattened; conv='flatten' gives "
                "it all of them."
            )
        else:
            hint = "Use a stock AdamW, or name matrices through muon_params."
        raise ValueError(
            f"Nothing to train with Muon: all {len(self.routes)} trainable parameters went to "
            f"AdamW ({', '.join(kinds)}). {hint}"
        )

    def param_groups(
        self, config: MuonConfig, given: Iterable[Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return the optimizer's groups: Muon first, then AdamW; decayed first; none empty.

        Parameters on different device meshes get different groups. So do LoRA pairs that are
        updated together, and other matrices.

        Args:
            config: Gives the hyper-parameters of both halves.
            given: Parameters, or groups of them as another optimizer takes them. Each group is
                split by the routes and keeps its own hyper-parameters; if it repeats the run's
                ``lr`` or ``weight_decay``, its AdamW part follows the settings of that half.
                Default: all parameters of the plan.

        Returns:
            Groups with ``params`` as ``(name, parameter)`` pairs. Muon groups hold ``matrices``,
            aligned with ``params``: for each a tuple of ``(offset, shape, strides, fan_out_dim)``.
            With LoRA they also hold ``pairs``, ``factors`` and ``scalings``, aligned too: the name
            of the partner, ``A`` or ``B``, and c; these are empty or 0 for other parameters.

        Raises:
            ValueError: No parameter was routed to Muon; the settings ask for other routes; a given
                parameter that needs a gradient is not in the plan; or a given group does not
                determine the learning rate of its AdamW part.
        """
        self.require_matrices()
        config = with_routing(config, self.config)
        _log_fallbacks(self.muon, config.lora_update)
        last = max(n for n, one in enumerate(self.routes) if one.algorithm == "muon")
        is_named = any("adamw_params" in one.reason for one in self.routes[last:])
        if self.headless and not is_named and get_node_local_rank(fallback_rank=0) == 0:
            logger.warning(
                "No output head was recognized, so every matrix of a linear layer goes to Muon; "
                "the last one is %s. A head belongs to AdamW: name it in adamw_params.",
                self.routes[last].name,
            )
        return param_groups(list(zip(self.routes, self.parameters, strict=True)), config, given)


def route(model: nn.Module, config: MuonConfig | None = None) -> RoutePlan:
    """Decide for every trainable parameter of a model whether Muon or AdamW trains it.

    Args:
        model: Any module, also wrapped by DDP, ``torch.compile`` or PEFT.
        config: Gives ``muon_params``, ``adamw_params``, ``conv``, ``split_fused``,
            ``split_heads``, ``lr_multipliers`` and ``lora_update``. Default: none of them.

    Returns:
        The plan. Its Muon half may be empty; :meth:`RoutePlan.param_groups` then raises.

    Raises:
        ValueError: A pattern matches nothing, or sends a parameter without matrices to Muon.
    """
    config = MuonConfig() if config is None else config
    facts, peft = survey(model), adapters(model)
    muon = _matched("muon_params", config.muon_params, facts)
    adamw = _matched("adamw_params", config.adamw_params, facts)
    contexts = [
        Context(c, muon.get(c.name), adamw.get(c.name), peft.get(id(c.parameter)), facts, config)
        for c in facts.candidates
    ]
    decisions = list(map(decide, contexts))
    names = {
        id(candidate.parameter): candidate.name
        for candidate, decision in zip(facts.candidates, decisions, strict=True)
        if decision.algorithm == "muon"
    }
    decayed, factors = _decayed_names(model), _lr_factors(config.lr_factors, facts)

    def finished(context: Context, decision: Decision) -> Route:
        candidate, adapter = context.candidate, context.adapter
        made = Route(
            name=candidate.name,
            shape=candidate.shape,
            algorithm=decision.algorithm,
            reason=decision.reason,
            matrices=decision.matrices,
            decay=candidate.raw_name in decayed,
            lr_multiplier=factors.get(candidate.name, 1.0),
        )
        if adapter is None or adapter.factor is None or decision.algorithm != "muon":
            return made
        return _of_factor(made, adapter, names.get(id(adapter.partner)), config.lora_update)

    routes = tuple(map(finished, contexts, decisions))
    if config.lora_update != "factor" and not any(route.factor for route in routes):
        raise ValueError(
            f"lora_update={config.lora_update!r} is for LoRA factors, and Muon trains none in this "
            "model. Attach an adapter of rank 2 or more before the optimizer is made, or use "
            "lora_update='factor'."
        )
    _check_rates_of_pairs(routes)
    return RoutePlan(
        config=config,
        routes=routes,
        parameters=tuple(candidate.parameter for candidate in facts.candidates),
        frozen=len(facts.frozen),
        remedy=_flat_parameters(model),
        headless=not facts.knows_heads and not any(r.kind == "head" or r.factor for r in routes),
    )


def _of_factor(made: Route, adapter: Adapter, pair: str | None, lora_update: LoraUpdate) -> Route:
    """Return the route of LoRA's A or B; its reason says if it is not updated as asked for."""
    obstacle = adapter.beyond or ("" if pair else "Muon does not train its partner")
    obstacle = obstacle if lora_update != "factor" else ""
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
    """Log how many LoRA matrices are not updated as asked for, and why."""
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
    """Return the names of the parameters that the Trainer would decay."""
    from transformers.trainer_pt_utils import get_parameter_names

    names = get_parameter_names(model, UNDECAYED_LAYERS, UNDECAYED_NAMES)  # type: ignore[no-untyped-call]
    return set(names)


def _flat_parameters(model: nn.Module) -> str:
    """Return a remedy under FSDP1, which flattens parameters, so that their matrices are gone."""
    if not any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return ""
    return (
        "The model is wrapped by FSDP version 1, which flattens matrices into vectors. Use FSDP "
        "version 2 (fsdp_version: 2 in the accelerate or fsdp_config), which keeps them."
    )


def _matched(field_name: str, patterns: Iterable[str], facts: Survey) -> dict[str, str]:
    """Return the first pattern that matches each name; raise if a pattern matches none."""
    names = [candidate.name for candidate in facts.candidates]
    found: dict[str, str] = {}
    for pattern in patterns:
        matches = [name for name in names if re.search(pattern, name)]
        if not matches:
            raise ValueError(_no_match(field_name, pattern, names, facts))
        for name in matches:
            found.setdefault(name, pattern)
    return found


def _lr_factors(by_pattern: dict[str, float], facts: Survey) -> dict[str, float]:
    """Return each parameter's multiplier of the learning rate: the first matching pattern's."""
    found = _matched("lr_multipliers", by_pattern, facts)
    for pattern in by_pattern:
        if pattern in found.values():
            continue
        raise ValueError(
            f"lr_multipliers holds {pattern!r}, and patterns before it match every parameter that "
            "it does; the first that matches counts. Put it before them, or leave it out."
        )
    return {name: by_pattern[pattern] for name, pattern in found.items()}


def _check_rates_of_pairs(routes: Iterable[Route]) -> None:
    """Raise if the A and B of a pair that is updated together have different learning rates."""
    factors: dict[str | None, float] = {one.name: one.lr_multiplier for one in routes}
    for one in routes:
        together = one.pair is not None and one.lora_update != "factor"
        if together and factors[one.pair] != one.lr_multiplier:
            raise ValueError(
                f"lr_multipliers gives {one.name} the factor {one.lr_multiplier:g} and {one.pair} "
                f"{factors[one.pair]:g}, and lora_update={one.lora_update!r} moves both together: "
                "match both, or use lora_update='factor'."
            )


def _no_match(field_name: str, pattern: str, names: list[str], facts: Survey) -> str:
    message = f"{field_name} holds {pattern!r}, which matches no trainable parameter."
    for alias, name in facts.aliases.items():
        if re.search(pattern, alias):
            return f"{message} {alias} is tied: the tensor is trained as {name}."
    for name in facts.frozen:
        if re.search(pattern, name):
            return f"{message} {name} is frozen (requires_grad=False)."
    bare = re.sub(_IN_WRAPPERS, "", pattern)
    with contextlib.suppress(re.error):
        if bare != pattern and any(re.search(bare, name) for name in names):
            return f"{message} Names are those without wrappers: write {bare!r}."
    words = {step for name in names for step in name.split(".")} | set(names)
    return message + near(pattern.strip("^$."), words)


_IN_WRAPPERS = re.compile(rf"(?:{'|'.join(sorted(set(WRAPPERS.values())))})\\?\.")


def state_bytes(plan: RoutePlan, config: MuonConfig) -> dict[str, int]:
    """Return the bytes of optimizer state under the plan, and under AdamW alone.

    Muon keeps the buffers of its rule: one per matrix by default, none in ``polar_only``. AdamW
    keeps two. Both keep a step counter of four bytes per tensor.
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
        shapes = [(matrix.rows, matrix.cols) for matrix in one.matrices]
        muon += 4
        for buffer in kept_by(vars(config)):
            whole = buffer.kind != "entries"
            numbers = math.prod(buffer.shape(shapes)) if whole else one.numel
            muon += numbers * (buffer.dtype or (torch.float32 if whole else dtype)).itemsize
    return {"muon": muon, "adamw": adamw, "total": muon + adamw, "adamw_only": reference}
