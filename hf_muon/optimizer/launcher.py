"""What DeepSpeed's checkpoints need of an optimizer, and what their loaders do to one.

In: states and param groups. Out: the same, as DeepSpeed (0.19) can save them, or as they were
before it loaded them. Universal checkpoints know Adam's state only; their loaders write into
groups and states past ``load_state_dict``, and the one for ZeRO-3 gives the settings of the first
group to all groups, and one step count to all tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_muon.optimizer.checkpoint import check_overwritten
from hf_muon.optimizer.entries import Entry, Group
from hf_muon.rules import rule_of


def complete_state(group: Group, state: dict[str, Tensor], flat: Tensor) -> None:
    """Make the state of a flat tensor Adam's and its own.

    What Muon has no use for are zeros that take no memory; a loader may have made whole tensors of
    them. The step count, which AdamW increments in place, is copied, since a loader may have given
    the same tensor to others; Muon's is read on the CPU.
    """
    for name in _unused(group):
        if name not in state or any(state[name].stride()):
            state[name] = flat.detach().new_zeros(()).expand(flat.shape)
    on_cpu = group["algorithm"] == "muon"
    state["step"] = state["step"].to("cpu", copy=True) if on_cpu else state["step"].clone()


def _unused(group: Group) -> tuple[str, ...]:
    if group["algorithm"] == "adamw":
        return ()
    used = {buffer.name for buffer in rule_of(group).buffers}
    return tuple(name for name in ("exp_avg", "exp_avg_sq") if name not in used)


def is_rehearsal(entries: Sequence[Entry], state: Mapping[Tensor, Any]) -> bool:
    """Whether DeepSpeed only wants to see memory allocated; such a step must do nothing.

    Its stage 0 in half precision steps once on zero gradients when it is built (0.19); that would
    decay the weights and count a step.
    """
    copies = any([entry.is_copy for entry in entries])
    fresh = copies and not any(state[entry.tensor] for entry in entries)
    gradients = (entry.tensor.grad for entry in entries)
    return fresh and not any(g is not None and bool(g.any()) for g in gradients)


def settings_of(group: Group) -> Group:
    """What a group holds besides its tensors."""
    return {key: value for key, value in group.items() if key != "params"}


def was_loaded(groups: Sequence[Group], settings: Sequence[Group]) -> bool:
    """Whether a loader has written over a group since ``settings`` were taken."""
    own = (settings[group["group_id"]] for group in groups)
    pairs = zip(groups, own, strict=True)
    return any(group.get("param_names") is not one.get("param_names") for group, one in pairs)


def with_own_settings(groups: list[Group], settings: list[Group]) -> list[Group]:
    """Undo a loader that copied the first group's settings to all: give each group its own again.

    What was loaded must fit this optimizer, as in ``load_state_dict``. Learning rates keep the
    ratios that they had, since the loaded one may have been scheduled.

    Args:
        groups: The optimizer's groups; written where they are copies.
        settings: What :func:`settings_of` gave for each group before.

    Returns:
        The settings of all groups now.

    Raises:
        ValueError: The loaded groups have other routes or another order.
    """
    for group in groups:
        own = settings[group["group_id"]]
        if group.get("param_names") is not own.get("param_names"):  # it was loaded
            check_overwritten(group, own, settings)
            group.update({key: own[key] for key in ("param_names", "matrices") if key in own})
    if len(groups) != len(settings):
        return settings  # DeepSpeed's first stages step one group at a time, and copy nothing
    for number, (group, own) in enumerate(zip(groups, settings, strict=True)):
        if group["group_id"] == number:
            continue
        loaded = {**group}
        group.clear()
        group.update(own, params=loaded["params"])
        for key in {"lr", "initial_lr"} & loaded.keys():
            group[key] = loaded[key] * _ratio(own, settings[0])
    return [settings_of(group) for group in groups]


def _ratio(own: Group, first: Group) -> float:
    """A group's learning rate over the first group's, before any schedule."""
    mine, theirs = own.get("initial_lr", own["lr"]), first.get("initial_lr", first["lr"])
    return float(mine / theirs) if theirs else 1.0
