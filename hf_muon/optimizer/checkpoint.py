"""Loading a checkpoint: what must agree, and what torch's loader would lose.

In: the optimizer and a state dict. Out: nothing, or an error or a warning that names what differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

Group = dict[str, Any]

# Values that change while training, or that say where the group's parameters are.
_NOT_COMPARED = {"params", "param_names", "matrices", "pairs", "lr", "initial_lr", "momentum"}


def check_routing(own: Sequence[Group], saved: Sequence[Group]) -> None:
    """Refuse a checkpoint whose parameters were routed otherwise or trained in another order.

    Groups without parameter names cannot be compared and are left to torch's own checks.

    Raises:
        ValueError: Names up to five of the parameters that differ.
    """
    mine, theirs = _routes(own), _routes(saved)
    if mine and theirs:
        differing = sorted(
            name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
        )
        if differing:
            raise ValueError(_routing_message(differing, mine, theirs))
    if len(own) == len(saved):
        for group, loaded in zip(own, saved, strict=True):
            _check_settings(group, loaded)


def _routes(groups: Sequence[Group]) -> dict[str, tuple[str, Any]]:
    """Parameter name -> (algorithm, matrices) of every named parameter of our groups."""
    routes = {}
    for group in groups:
        names = group.get("param_names")
        if names is None or "algorithm" not in group:
            continue
        matrices = group.get("matrices", [()] * len(names))
        for name, inside in zip(names, matrices, strict=True):
            routes[name] = (group["algorithm"], inside)
    return routes


def _routing_message(
    names: list[str], mine: dict[str, tuple[str, Any]], theirs: dict[str, tuple[str, Any]]
) -> str:
    def said(routes: dict[str, tuple[str, Any]], name: str) -> str:
        algorithm, inside = routes.get(name, ("absent", ()))
        return f"{algorithm} as {len(inside)} matrices" if algorithm == "muon" else algorithm

    listed = "; ".join(f"{n}: {said(theirs, n)} there, {said(mine, n)} here" for n in names[:5])
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"The checkpoint was routed otherwise: {listed}{more}. Load it with the muon_params, "
        "adamw_params and split_fused it was trained with (its muon_report.json has them), or "
        "start the optimizer afresh."
    )


def _check_settings(group: Group, loaded: Group) -> None:
    if group.get("order") != loaded.get("order", group.get("order")):
        raise ValueError(
            f"The checkpoint was trained with order={loaded['order']!r} and this optimizer has "
            f"order={group['order']!r}: their buffers hold different things. Use the same order, "
            "or start the optimizer afresh."
        )
    changed = [
        f"{key}={loaded[key]!r} (not {group[key]!r})"
        for key in sorted(group.keys() & loaded.keys() - _NOT_COMPARED)
        if group[key] != loaded[key]
    ]
    if changed:
        warnings.warn(
            "The checkpoint's settings are used where they differ from this optimizer's: "
            + ", ".join(changed),
            stacklevel=4,
        )


def keep_momentum_dtype(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put back momentum in its own dtype: torch's loader casts state to the parameter's.

    Seen in torch 2.13, ``Optimizer._process_value_according_to_param_policy``.
    """
    saved_groups = state_dict["param_groups"]
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        if group.get("momentum_dtype", "parameter") == "parameter":
            continue
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            buffer = state_dict["state"].get(index, {}).get("exp_avg")
            if buffer is not None:
                dtype = getattr(torch, group["momentum_dtype"])
                moved = buffer.to(device=parameter.device, dtype=dtype, copy=True)
                optimizer.state[parameter]["exp_avg"] = moved
