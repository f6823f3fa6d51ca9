"""What DeepSpeed's checkpoints need from an optimizer, and what its loaders change in one.

In: states and param groups. Out: the same, as DeepSpeed (0.19) can save them, or as they were
before it loaded them. Universal checkpoints know only Adam's state. Their loaders write into groups
and states without calling ``load_state_dict``; the one for ZeRO-3 gives all groups the settings of
the first, and all tensors one step count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_muon.optimizer.buffers import buffers_of
from hf_muon.optimizer.checkpoint import check_overwritten
from hf_muon.optimizer.entries import Entry, Group


def complete_state(group: Group, state: dict[str, Tensor], flat: Tensor) -> None:
    """Give a flat tensor all of Adam's state, in tensors of its own.

    Entries that Muon does not use are zeros that take no memory; a loader may have made full
    tensors of them. The step count is copied, since AdamW increments it in place and a loader may
    have shared one tensor; Muon's is read on the CPU.
    """
    used = {buffer.name for buffer in buffers_of(group)}
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in used and (name not in state or any(state[name].stride())):
            state[name] = flat.detach().new_zeros(()).expand(flat.shape)
    on_cpu = group["algorithm"] == "muon"
    state["step"] = state["step"].to("cpu", copy=True) if on_cpu else state["step"].clone()


def is_rehearsal(entries: Sequence[Entry], state: Mapping[Tensor, Any]) -> bool:
    """Whether DeepSpeed only wants memory to be allocated; such a step must do nothing.

    Its stage 0 in half precision does one step on zero gradients when it is built (0.19), which
    would decay the weights and count as a step.
    """
    copies = any([entry.is_copy for entry in entries])
    fresh = copies and not any(state[entry.tensor] for entry in entries)
    gradients = (entry.tensor.grad for entry in entries)
    return fresh and not any(g is not None and bool(g.any()) for g in gradients)


def settings_of(group: Group) -> Group:
    """Return what a group holds besides its tensors."""
    return {key: value for key, value in group.items() if key != "params"}


def was_loaded(groups: Sequence[Group], settings: Sequence[Group]) -> bool:
    """Whether a loader has written over a group since ``settings`` were saved."""
    own = (settings[group["group_id"]] for group in groups)
    pairs = zip(groups, own, strict=True)
    return any(group.get("param_names") is not one.get("param_names") for group, one in pairs)


def with_own_settings(groups: list[Group], settings: list[Group]) -> list[Group]:
    """Undo a loader that copied the first group's settings to all: restore each group's own.

    The loaded settings must fit this optimizer, as in ``load_state_dict``. Learning rates keep
    their ratios, since the loaded one may have been scheduled.

    Args:
        groups: The optimizer's groups; written if they are copies.
        settings: The result of :func:`settings_of` for each group before.

    Returns:
        The current settings of all groups.

    Raises:
        ValueError: The loaded groups have other routes or another order.
    """
    for group in groups:
        own = settings[group["group_id"]]
        if group.get("param_names") is not own.get("param_names"):  # a loader has replaced it
            check_overwritten(group, own, settings)
            group.update({key: own[key] for key in ("param_names", "matrices") if key in own})
    if len(groups) != len(settings):
        return settings  # DeepSpeed's stages 1 and 2 step one group at a time, and copy nothing
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
    """Return a group's learning rate divided by the first group's, before any schedule."""
    mine, theirs = own.get("initial_lr", own["lr"]), first.get("initial_lr", first["lr"])
    return float(mine / theirs) if theirs else 1.0
