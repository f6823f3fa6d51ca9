"""From routes to the optimizer's param groups.

In: the routes of a plan with their parameters, and the settings. Out: groups of plain values,
Muon's first, none of them empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_muon.config import MuonConfig
from hf_muon.distributed.layout import Matrix

if TYPE_CHECKING:
    from hf_muon.routing.plan import Route

Bound = tuple["Route", nn.Parameter]


def param_groups(bound: Sequence[Bound], config: MuonConfig) -> list[dict[str, Any]]:
    """What :meth:`~hf_muon.routing.plan.RoutePlan.param_groups` returns."""
    groups = []
    for kind in _KINDS:
        for members in _by_mesh([b for b in bound if _kind(b[0]) == kind]):
            groups.append({**_settings(members[0][0], config), **_members(members)})
    return groups


# (algorithm, decays, moves as a pair), in the order of the groups.
_KINDS = [
    (algorithm, decay, paired)
    for algorithm, both in (("muon", (False, True)), ("adamw", (False,)))
    for decay in (True, False)
    for paired in both
]


def _kind(route: Route) -> tuple[str, bool, bool]:
    return route.algorithm, route.decay, route.lora_update in ("product", "tangent")


def _settings(route: Route, config: MuonConfig) -> dict[str, Any]:
    if route.algorithm == "adamw":
        return config.adamw_group(route.decay)
    return {**config.muon_group(route.decay), "lora_update": route.lora_update or "factor"}


def _by_mesh(bound: list[Bound]) -> list[list[Bound]]:
    """Members of one group must share a device mesh; plain tensors share None."""
    groups: list[tuple[Any, list[Bound]]] = []
    for member in bound:
        mesh = getattr(member[1], "device_mesh", None)
        for key, members in groups:
            if key == mesh:
                members.append(member)
                break
        else:
            groups.append((mesh, [member]))
    return [members for _, members in groups]


def _members(bound: list[Bound]) -> dict[str, Any]:
    routes = [route for route, _ in bound]
    group: dict[str, Any] = {"params": [(route.name, parameter) for route, parameter in bound]}
    if routes[0].algorithm == "muon":
        group["matrices"] = tuple(tuple(map(plain, route.matrices)) for route in routes)
        if any(route.pair for route in routes):
            group["pairs"] = tuple(route.pair or "" for route in routes)
            group["factors"] = tuple(route.factor or "" for route in routes)
            group["scalings"] = tuple(route.scaling or 0.0 for route in routes)
    return group


def plain(matrix: Matrix) -> tuple[int, tuple[int, ...], tuple[int, ...], int | None]:
    """A matrix as nested tuples, which ``torch.load(weights_only=True)`` accepts."""
    return (matrix.offset, tuple(matrix.shape), tuple(matrix.strides), matrix.fan_out_dim)
