"""What DeepSpeed's checkpoints need of an optimizer, and what their loaders do to one.

In: states and param groups. Out: the same, as DeepSpeed (0.19) can save them, or as they were
before it loaded them. Universal checkpoints know Adam's state only, and their loader for ZeRO-3
gives the settings of the first group to all groups.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

Group = dict[str, Any]


def add_placeholders(state: dict[str, Tensor], flat: Tensor) -> None:
    """Fill up the state of a flat tensor to Adam's: zeros that take no memory."""
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = flat.detach().new_zeros(()).expand(flat.shape)


def settings_of(group: Group) -> Group:
    """What a group holds besides its tensors."""
    return {key: value for key, value in group.items() if key != "params"}


def with_own_settings(groups: list[Group], settings: list[Group]) -> list[Group]:
    """Undo a loader that copied the first group's settings to all: give each group its own again.

    Learning rates keep the ratios that they had, since the loaded one may have been scheduled.

    Args:
        groups: The optimizer's groups; written where they are copies.
        settings: What :func:`settings_of` gave for each group before.

    Returns:
        The settings of all groups now.
    """
    if len(groups) != len(settings):
        return settings  # DeepSpeed's first stages step one group at a time, and copy nothing
    for number, (group, own) in enumerate(zip(groups, settings, strict=True)):
        if group["group_id"] == number:
            continue
        loaded = settings_of(group)
        group.update(own)
        for key in {"lr", "initial_lr"} & loaded.keys():
            group[key] = loaded[key] * _ratio(own, settings[0])
    return [settings_of(group) for group in groups]


def _ratio(own: Group, first: Group) -> float:
    """A group's learning rate over the first group's, before any schedule."""
    mine, theirs = own.get("initial_lr", own["lr"]), first.get("initial_lr", first["lr"])
    return float(mine / theirs) if theirs else 1.0
