"""Continue from the state of another Muon.

In: a state dict of torch.optim.Muon or of Moonlight's Muon. Out: the same momentum in ours, where
it is called ``exp_avg``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_muon.optimizer.entries import Group
from hf_muon.optimizer.muon import Muon
from hf_muon.rules import FILTERS, rule_of


def import_state(
    optimizer: Muon, state_dict: dict[str, Any], names: Sequence[str] | None = None
) -> list[str]:
    """Load the state of ``torch.optim.Muon`` or of Moonlight's ``Muon`` into ours.

    torch's buffer is the average M ← βM + (1−β)G that ours is, and is copied. Moonlight's is the
    sum M ← βM + G, and is multiplied by 1−β; its AdamW moments are copied as well. Parameters that
    the state dict does not hold start afresh.

    Args:
        optimizer: Ours, with named parameters, as :func:`hf_muon.create_muon_optimizer` builds it.
        state_dict: What ``optimizer.state_dict()`` of the other one returned.
        names: Names of the other optimizer's parameters, in its order; None where its groups hold
            ``param_names``.

    Returns:
        The names whose state was loaded.

    Raises:
        ValueError: The rule keeps something other than one average of gradients; names are
            missing, unknown, or too few; or a shape or an algorithm differs.

    References:
        torch/optim/_muon.py (2.13); https://github.com/MoonshotAI/Moonlight, toy_train.py.
    """
    own = _own_parameters(optimizer)
    group = optimizer.param_groups[0]
    if not filters_by_one_average(group):
        names = ("order", "filter", "momentum", "prefilter")
        given = ", ".join(f"{name}={group[name]!r}" for name in names)
        raise ValueError(
            "The state holds averages of gradients, which order='pre_polar' with filter='ema', one "
            f"β and no prefilter keeps; {given} cannot continue."
        )
    found = {
        name: _translated(state, group)
        for name, state, group in _named_states(state_dict, names)
        if state
    }
    for name, state in found.items():
        _check(name, state, own)
    ours = optimizer.state_dict()
    index = {
        name: i
        for group in ours["param_groups"]
        for name, i in zip(group["param_names"], group["params"], strict=True)
    }
    ours["state"].update({index[name]: state for name, state in found.items()})
    optimizer.load_state_dict(ours)
    return list(found)


def filters_by_one_average(group: Group) -> bool:
    """Whether all that a group does before the polar factor is M ← βM + (1−β)G, with one β."""
    return rule_of(group).before == (FILTERS["ema"],)


def _own_parameters(optimizer: Muon) -> dict[str, tuple[Tensor, str]]:
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError(
            "The optimizer's parameters have no names to match by: build it with "
            "create_muon_optimizer(model), or from model.named_parameters()."
        )
    return {
        name: (parameter, group["algorithm"])
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _named_states(
    state_dict: dict[str, Any], names: Sequence[str] | None
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, state, group) of each parameter of the other optimizer."""
    places = [(i, group) for group in state_dict["param_groups"] for i in group["params"]]
    if names is None:
        groups = state_dict["param_groups"]
        if any("param_names" not in group for group in groups):
            raise ValueError(
                "The state dict does not name its parameters: pass names=[…], in the order in "
                "which the other optimizer got them."
            )
        names = [name for group in groups for name in group["param_names"]]
    if len(names) != len(places):
        raise ValueError(f"{len(names)} names are given for {len(places)} parameters.")
    return [
        (name, state_dict["state"].get(i, {}), group)
        for name, (i, group) in zip(names, places, strict=True)
    ]


def _translated(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
    """A state of the other optimizer in our terms."""
    moonlight = "adamw_betas" in group
    if "momentum_buffer" in state:
        share = 1 - group["momentum"] if moonlight else 1.0
        return {"step": torch.zeros(()), "exp_avg": state["momentum_buffer"] * share}
    if moonlight and state.keys() >= {"moment1", "moment2", "step"}:
        step = torch.tensor(float(state["step"]))
        moments = {"exp_avg": state["moment1"].clone(), "exp_avg_sq": state["moment2"].clone()}
        return {"step": step, **moments}
    raise ValueError(
        f"A state holds {sorted(state)}; 'momentum_buffer' (torch.optim.Muon, Moonlight) or "
        "'moment1' and 'moment2' (Moonlight) are expected."
    )


def _check(name: str, state: dict[str, Tensor], own: dict[str, tuple[Tensor, str]]) -> None:
    if name not in own:
        raise ValueError(f"The state dict holds {name!r}, which this optimizer does not train.")
    parameter, algorithm = own[name]
    if state["exp_avg"].shape != parameter.shape:
        raise ValueError(
            f"The state of {name} has shape {tuple(state['exp_avg'].shape)}, the parameter "
            f"{tuple(parameter.shape)}."
        )
    theirs = "adamw" if "exp_avg_sq" in state else "muon"
    if theirs != algorithm:
        raise ValueError(
            f"{name} was trained by {theirs} there and is trained by {algorithm} here: route it "
            f"with {theirs}_params."
        )
