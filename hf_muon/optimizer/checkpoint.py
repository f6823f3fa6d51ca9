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
_TUPLES = {"matrices", "pairs", "factors", "scalings", "betas"}
_NOT_COMPARED = {
    "params", "param_names", "matrices", "pairs", "factors", "lr", "initial_lr", "group_id",
}  # fmt: skip


def with_plain_groups(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with tuples where torch.distributed.checkpoint has made lists of them.

    Seen in torch 2.13 with ``full_state_dict=True``.
    """
    groups = [
        {key: _tuples(value) if key in _TUPLES else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def check_routing(own: Sequence[Group], saved: Sequence[Group]) -> None:
    """Refuse a checkpoint of another optimizer, of other routes, or of another order.

    Groups without parameter names are compared by number and size only.

    Raises:
        ValueError: Names up to five of the parameters that differ.
    """
    if any("algorithm" not in group for group in saved):
        raise ValueError(
            "The checkpoint holds the state of another optimizer. Start afresh (from the Trainer: "
            "delete optimizer.pt in the checkpoint), or take over the momentum of "
            "torch.optim.Muon or Moonlight with hf_muon.optimizer.import_state."
        )
    mine, theirs = _routes(own), _routes(saved)
    differing = sorted(
        name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
    )
    if mine and theirs and differing:
        raise ValueError(_routing_message(differing, mine, theirs))
    if _order_of_names(own) != _order_of_names(saved):
        raise ValueError(
            "The checkpoint has the same parameters in other groups or in another order, and "
            "state is loaded by position. Build the optimizer from the same model code and with "
            "the same settings."
        )
    for group, loaded in zip(own, saved, strict=True):
        _check_settings(group, loaded)


def check_overwritten(loaded: Group, own: Group, every: Sequence[Group]) -> None:
    """The same check for one group, by a loader that wrote over it.

    Args:
        loaded: What the loader wrote.
        own: What stood there.
        every: What stood in all groups.

    Raises:
        ValueError: Names up to five of the parameters that differ.
    """
    here, there = _routes(every), _routes([loaded])
    names = sorted(
        name
        for name in _routes([own]).keys() | there.keys()
        if here.get(name) != there.get(name, ("in another group", ()))
    )
    if names:
        raise ValueError(_routing_message(names, here, there, "in another group"))
    _check_settings(own, loaded)


def _order_of_names(groups: Sequence[Group]) -> list[Any]:
    """What torch's loader goes by: the names of each group in turn, or their number."""
    named = all("param_names" in group for group in groups)
    return [group["param_names"] if named else len(group["params"]) for group in groups]


def _routes(groups: Sequence[Group]) -> dict[str, tuple[str, Any]]:
    """Parameter name -> (algorithm, matrices)."""
    routes = {}
    for group in groups:
        names = group.get("param_names", [])
        matrices = group.get("matrices", [()] * len(names))
        for name, inside in zip(names, matrices, strict=False):
            routes[name] = (group["algorithm"], inside)
    return routes


def _routing_message(
    names: list[str],
    mine: dict[str, tuple[str, Any]],
    theirs: dict[str, tuple[str, Any]],
    otherwise: str = "absent",
) -> str:
    def said(routes: dict[str, tuple[str, Any]], name: str, otherwise: str) -> str:
        algorithm, inside = routes.get(name, (otherwise, ()))
        return f"{algorithm} as {len(inside)} matrices" if algorithm == "muon" else algorithm

    listed = "; ".join(
        f"{name}: {said(theirs, name, otherwise)} there, {said(mine, name, 'absent')} here"
        for name in names[:5]
    )
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
    skipped = set(_NOT_COMPARED)
    if not group.get("momentum_warmup_steps") and not loaded.get("momentum_warmup_steps"):
        skipped.add("momentum_start")  # follows from momentum, and is not used
    changed = [
        f"{key}={loaded[key]!r} (not {group[key]!r})"
        for key in sorted(group.keys() & loaded.keys() - skipped)
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
