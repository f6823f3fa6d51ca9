"""A route, the decision for one parameter, and the param groups that follow from routes.

In: the decisions of the rules; routes with their parameters, the settings, and any groups that a
client built. Out: a :class:`Route`; groups of plain values, Muon's first, none of them empty.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_muon.config import LoraUpdate, MuonConfig
from hf_muon.distributed.layout import Matrix
from hf_muon.routing.adapters import Factor
from hf_muon.routing.rules import Algorithm
from hf_muon.values import shown


@dataclass(frozen=True)
class Route:
    """The decision for one parameter.

    Attributes:
        name: Name in the model, without the prefixes of wrappers.
        shape: Shape of the whole parameter.
        algorithm: ``muon`` or ``adamw``.
        reason: Why; the part before the first colon or comma is the kind.
        matrices: The matrices that Muon orthogonalizes; empty under AdamW.
        decay: Whether weight decay applies, by the Trainer's own rule.
        lr_multiplier: Multiplies the learning rate.
        pair: For LoRA's A or B: the name of its partner, if Muon trains that too.
        scaling: For LoRA's A or B: c of W₀ + cBA.
        factor: For LoRA's A or B: ``A`` or ``B``.
        lora_update: How LoRA's A or B is updated: as set, or ``factor`` if that is impossible.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: Algorithm
    reason: str
    matrices: tuple[Matrix, ...] = ()
    decay: bool = True
    lr_multiplier: float = 1.0
    pair: str | None = None
    scaling: float | None = None
    factor: Factor | None = None
    lora_update: LoraUpdate | None = None

    @property
    def numel(self) -> int:
        """Number of elements of the parameter."""
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """The first words of the reason."""
        return re.split("[:,(]", self.reason)[0].strip()

    def to_dict(self) -> dict[str, Any]:
        """Return the route as plain values, for JSON."""
        matrices = list(map(tuple, self.matrices))
        return {**vars(self), "shape": list(self.shape), "matrices": matrices}


_ROUTED_BY = (
    "muon_params", "adamw_params", "conv", "split_fused", "split_heads", "lr_multipliers",
    "lora_update",
)  # fmt: skip


def with_routing(config: MuonConfig, routed: MuonConfig) -> MuonConfig:
    """Return settings with those that a plan was made with.

    Raises:
        ValueError: One of these is set to something else.
    """
    kept = {}
    for name in _ROUTED_BY:
        before, now = getattr(routed, name), getattr(config, name)
        if now == before:
            continue
        if now != getattr(MuonConfig, name):  # the default
            raise ValueError(
                f"{name}={shown(now)} is set, and the plan was made with {shown(before)}. Give "
                f"it to the plan: hf_muon.route(model, MuonConfig({name}={shown(now)}))."
            )
        kept[name] = before
    return dataclasses.replace(config, **kept) if kept else config


Bound = tuple[Route, nn.Parameter]


def param_groups(
    every: Sequence[Bound], config: MuonConfig, given: Iterable[Any] | None
) -> list[dict[str, Any]]:
    """Return the groups of :meth:`~hf_muon.routing.plan.RoutePlan.param_groups`."""
    if given is None:
        return _split(every, config, {})
    by_identity = {id(parameter): (one, parameter) for one, parameter in every}
    groups = [
        part
        for group in as_groups(given)
        for part in _split(_bound(group, by_identity), config, group)
    ]
    return sorted(groups, key=lambda group: group["algorithm"] != "muon")


def as_groups(given: Iterable[Any]) -> list[dict[str, Any]]:
    """Return an optimizer's argument, parameters or groups, as groups without names."""
    items = list(given)
    if items and not isinstance(items[0], dict):
        items = [{"params": items}]
    return [{**group, "params": _unnamed(group["params"])} for group in items]


def _unnamed(params: Any) -> list[Any]:
    params = [params] if isinstance(params, torch.Tensor) else params
    return [entry[1] if isinstance(entry, tuple) else entry for entry in params]


def _bound(group: Mapping[str, Any], by_identity: Mapping[int, Bound]) -> list[Bound]:
    wanted = [p for p in group["params"] if p.requires_grad]
    for parameter in wanted:
        if id(parameter) not in by_identity:
            raise ValueError(
                f"A param group holds a parameter of shape {tuple(parameter.shape)} that is not "
                "in the model which was routed. Pass the model that holds all parameters to "
                "get_optimizer_cls_and_kwargs(args, model), or plan=hf_muon.route(model)."
            )
    return [by_identity[id(parameter)] for parameter in wanted]


def _split(
    bound: Sequence[Bound], config: MuonConfig, given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return groups of one kind and mesh each, with the hyper-parameters given for all of them."""
    own = _without_factor(given)
    other = [one.name for one, _ in bound if one.algorithm != own.get("algorithm", one.algorithm)]
    if other:
        raise ValueError(
            f"A param group has algorithm={own['algorithm']!r}, and the routes send {other[0]} "
            "elsewhere. Leave the key out, and use muon_params and adamw_params; or pass complete "
            "groups to hf_muon.Muon."
        )
    mixed = len({one.algorithm for one, _ in bound}) > 1
    if mixed and config.adamw_lr is not None and own.get("lr", config.lr) != config.lr:
        raise ValueError(
            f"A param group with lr={own['lr']!r} of its own holds matrices and other parameters, "
            f"and adamw_lr={config.adamw_lr!r} is set: the group does not say which rate the "
            "others have. Make two groups of it, or leave adamw_lr out, so that both have its lr."
        )
    parts: dict[Any, list[Bound]] = {}  # a group is on one device mesh; plain tensors on none
    for one, parameter in sorted(bound, key=lambda entry: _kind(entry[0])):
        mesh = getattr(parameter, "device_mesh", None)
        parts.setdefault((_kind(one), mesh), []).append((one, parameter))
    # A mixed group's momentum is Muon's: AdamW would take it for its β₁.
    of_adamw = {key: value for key, value in own.items() if not mixed or key != "momentum"}
    of_half = {"muon": own, "adamw": of_adamw}
    return [_group(members, config, of_half) for members in parts.values()]


def _without_factor(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's hyper-parameters, its rate without the factor of an earlier optimizer."""
    own = {key: value for key, value in given.items() if key not in ("params", "param_names")}
    factor = own.pop("lr_multiplier", 1.0)
    if factor != 1 and "lr" in own:
        own.pop("initial_lr", None)
        rate = own.pop("lr")
        own |= {"lr": rate / factor} if factor else {}
    return own


def _kind(route: Route) -> tuple[bool, bool, bool, bool, float]:
    """Return what members of a group have in common; also the sort key of groups."""
    in_pairs, factor = route.lora_update in ("product", "tangent"), route.lr_multiplier
    return route.algorithm != "muon", not route.decay, in_pairs, factor != 1, factor


def _group(
    bound: list[Bound], config: MuonConfig, own: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the half's settings, updated by the group's own, the multiplied rate, and members."""
    routes = [route for route, _ in bound]
    algorithm, factor = routes[0].algorithm, routes[0].lr_multiplier
    group = _of_half(routes[0], config, own[algorithm])
    if factor != 1:
        group |= {"lr": group["lr"] * factor, "lr_multiplier": factor}
    group["params"] = [(route.name, parameter) for route, parameter in bound]
    if algorithm == "muon":
        # Nested tuples: torch.load(weights_only=True) accepts no others.
        group["matrices"] = tuple(tuple(map(tuple, route.matrices)) for route in routes)
        if any(route.pair for route in routes):
            group["pairs"] = tuple(route.pair or "" for route in routes)
            group["factors"] = tuple(route.factor or "" for route in routes)
            group["scalings"] = tuple(route.scaling or 0.0 for route in routes)
    return group


def _of_half(route: Route, config: MuonConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    if route.algorithm == "muon":
        own = {key: value for key, value in own.items() if key not in ("betas", "eps")}
        lora_update = route.lora_update or "factor"
        return {**config.muon_group(route.decay), **own, "lora_update": lora_update}
    run = {"lr": config.lr, "weight_decay": config.weight_decay}  # AdamW's may differ
    differing = {key: value for key, value in own.items() if value != run.get(key, ...)}
    return {**config.adamw_group(bool(own.get("weight_decay")) or route.decay), **differing}
