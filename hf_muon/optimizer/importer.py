"""Continue from the state of another Muon.

In: a state dict of the Muon of torch, Moonlight, DeepSpeed, Keller Jordan or dion. Out: the same
momentum here, where it is called ``exp_avg``, and the moments of AdamW's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_muon.optimizer.buffers import step_count
from hf_muon.optimizer.checkpoint import without_wrappers
from hf_muon.optimizer.entries import Group
from hf_muon.optimizer.muon import Muon
from hf_muon.rules import FILTERS, rule_of


def import_state(
    optimizer: Muon, state_dict: dict[str, Any], names: Sequence[str] | None = None
) -> list[str]:
    """Load the state of another Muon, or of the AdamW beside it, into ours.

    In torch, DeepSpeed and Keller Jordan's Muon, the buffer is the average M ← βM + (1−β)G, as
    here, and is copied. In Moonlight and dion it is the sum M ← βM + G, and is multiplied by 1−β.
    AdamW's moments and step count are copied, also from ``torch.optim.AdamW``. Parameters that the
    state dict does not hold keep their state here, or start from zero.

    Args:
        optimizer: Our optimizer, with named parameters as from
            :func:`hf_muon.create_muon_optimizer`.
        state_dict: The other optimizer's ``state_dict()``, without ZeRO.
        names: Names of the other optimizer's parameters, in the order of its ``param_groups``;
            None if these hold ``param_names``.

    Returns:
        The names of the parameters whose state was loaded, without prefixes of wrappers.

    Raises:
        ValueError: The rule keeps something other than one average of gradients; names are
            missing, unknown, or too few; a shape or an algorithm differs; or the state is of
            none of these optimizers.

    References:
        torch/optim/_muon.py (2.13); https://github.com/MoonshotAI/Moonlight, toy_train.py;
        deepspeed/runtime/zero/muon (0.19); https://github.com/microsoft/dion, dion/muon.py.
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
        for group in without_wrappers(ours["param_groups"])
        for name, i in zip(group["param_names"], group["params"], strict=True)
    }
    ours["state"].update({index[name]: state for name, state in found.items()})
    optimizer.load_state_dict(ours)
    return list(found)


def filters_by_one_average(group: Group) -> bool:
    """Return whether M ← βM + (1−β)G with one β is the only filter before the polar factor."""
    return rule_of(group).before == (FILTERS["ema"],)


def _own_parameters(optimizer: Muon) -> dict[str, tuple[Tensor, str]]:
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError(
            "The optimizer's parameters have no names to match by: build it with "
            "create_muon_optimizer(model), or from model.named_parameters()."
        )
    return {
        name: (parameter, group["algorithm"])
        for group in without_wrappers(optimizer.param_groups)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _named_states(
    state_dict: dict[str, Any], names: Sequence[str] | None
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (name, state, group) of each parameter of the other optimizer."""
    places = [(i, group) for group in state_dict["param_groups"] for i in group["params"]]
    if names is None:
        groups = state_dict["param_groups"]
        if any("param_names" not in group for group in groups):
            raise ValueError(
                "The state dict does not name its parameters: pass names=[…], in the order of the "
                "other optimizer's param_groups."
            )
        names = [name for group in groups for name in group["param_names"]]
    if len(names) != len(places):
        raise ValueError(f"{len(names)} names are given for {len(places)} parameters.")
    (group,) = without_wrappers([{"param_names": names}])
    names = group["param_names"]
    return [
        (name, state_dict["state"].get(i, {}), group)
        for name, (i, group) in zip(names, places, strict=True)
    ]


# Names of the first and second moment and step count of the AdamW half: in torch, DeepSpeed and
# Keller Jordan's; in Moonlight; in dion.
_MOMENTS = (
    ("exp_avg", "exp_avg_sq", "step"),
    ("moment1", "moment2", "step"),
    ("momentum", "variance", "step_dev"),
)


def _translated(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
    """Convert one parameter's state of the other optimizer to ours."""
    of_dion = group.get("algorithm") == "muon" and "mu" in group
    buffer = state.get("momentum" if of_dion else "momentum_buffer")
    if buffer is not None and "dampening" not in group:  # torch.optim.SGD has it
        is_sum = of_dion or "adamw_betas" in group  # Moonlight's
        share = 1 - float(group["mu" if of_dion else "momentum"]) if is_sum else 1.0
        return {"step": step_count(0), "exp_avg": buffer * share}
    for first, second, count in _MOMENTS:
        step = state.get(count, group.get("step"))  # some keep one count per group
        if state.keys() >= {first, second} and step is not None:
            moments = {"exp_avg": state[first].clone(), "exp_avg_sq": state[second].clone()}
            return {"step": step_count(step), **moments}
    raise ValueError(
        f"A state holds {sorted(state)}, and its group {sorted(group)}; the 'momentum_buffer' of a "
        "Muon of torch, DeepSpeed, Keller Jordan or Moonlight, the 'momentum' of dion's, or the "
        "two moments and 'step' of the AdamW beside it are expected."
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
