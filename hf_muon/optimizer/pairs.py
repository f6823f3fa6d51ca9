"""LoRA pairs that are updated as a product: which A belongs to which B, and that both are there.

In: a param group with ``pairs``, ``factors`` and ``scalings``, aligned with its parameters, or the
entries of such groups in a step. Out: a checked group, the entries that take part in the step, and
the pairs of matrices for its plan.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from hf_muon.distributed.buckets import Place
from hf_muon.distributed.layout import Matrix
from hf_muon.optimizer.entries import Entry, Group, trained_of
from hf_muon.optimizer.lora import pair_step_size
from hf_muon.rules import rule_of


def moves_pairs(group: Group) -> bool:
    """Whether the A and B of a Muon group are updated through their product."""
    return group["algorithm"] == "muon" and rule_of(group).whole.of_pairs


def partners(group: Group) -> list[int]:
    """Return, for each parameter of such a group, the position of its partner."""
    position = {name: index for index, name in enumerate(group["param_names"])}
    return [position[name] for name in group["pairs"]]


def check_pairs(group: Group, names: Sequence[str]) -> None:
    """Raise if an A or B has no partner, or a pair has no step size.

    Args:
        group: A group that updates pairs, with its ``matrices``.
        names: Names of its parameters; empty if they have none.

    Raises:
        ValueError: Names the parameter and what to do.
    """
    update, keys = group["lora_update"], ("pairs", "factors", "scalings")
    if not names or any(len(group.get(key, ())) != len(names) for key in keys):
        raise ValueError(
            f"A group with lora_update={update!r} needs named parameters, and for each its partner "
            "in 'pairs', 'A' or 'B' in 'factors', and the adapter's scaling in 'scalings': let "
            "hf_muon.create_muon_optimizer(model) make the groups, or use lora_update='factor'."
        )
    position = {name: index for index, name in enumerate(names)}
    for index, (name, other) in enumerate(zip(names, group["pairs"], strict=True)):
        partner = position.get(other, index)
        a, b = (partner, index) if group["factors"][index] == "B" else (index, partner)
        mutual = group["pairs"][partner] == name and group["factors"][a] + group["factors"][b]
        if mutual != "AB" or group["scalings"][a] != group["scalings"][b]:
            raise ValueError(
                f"{name} has lora_update={update!r} and no partner in its group that is the other "
                f"factor of the same adapter: {other!r} is given. Put both into one group, with "
                "the same weight decay, or this one into a group with lora_update='factor'."
            )
        of_a, of_b = ([Matrix(*m) for m in group["matrices"][i]] for i in (a, b))
        if [m.rows for m in of_a] != [m.cols for m in of_b]:
            raise ValueError(
                f"{names[a]} and {names[b]} do not fit: A (r, n) and B (m, r) are expected, one of "
                "each for every expert."
            )
        for one, two in zip(of_a, of_b, strict=True):
            pair_step_size(group["adjust_lr"], one, two, group["scalings"][a])  # raises


def check_decay(groups: Iterable[Group]) -> None:
    """Raise for a decay that would remove a whole product; on all ranks, since all know it.

    Raises:
        ValueError: lr·weight_decay of a group that updates pairs is 1 or more.
    """
    for group in groups:
        if moves_pairs(group):
            decay = group["lr"] * group["weight_decay"]
            if decay >= 1:
                raise ValueError(
                    f"lr·weight_decay is {decay:g} for an adapter's product; less than 1 is "
                    "allowed. Lower the weight decay or the learning rate."
                )


def check_trained(entries: Iterable[Entry]) -> None:
    """Raise if one factor of a pair is frozen while the other is trained.

    Raises:
        ValueError: Names the frozen one.
    """
    entries = [entry for entry in entries if entry.flat is None and not entry.is_copy]
    trained = set(trained_of(entries))
    frozen = {entry.indices[0]: entry for entry in entries if entry not in trained}
    partner = partners(entries[0].group) if frozen else []
    for index, entry in frozen.items():
        if partner[index] not in frozen:
            update = entry.group["lora_update"]
            raise ValueError(
                f"{entry.name} was frozen after the optimizer was made, and lora_update={update!r} "
                "moves both factors of an adapter. Freeze its partner as well, or make the "
                "optimizer with lora_update='factor'. No parameter and no state was changed."
            )


def taking_part(entries: Sequence[Entry], active: Container[Entry]) -> list[Entry]:
    """Return the entries of a group that a step trains: A or B also if only its partner is active.

    Args:
        entries: All entries of one group in this call of the optimizer.
        active: The entries that have a gradient on some rank.
    """
    if not entries or not moves_pairs(entries[0].group):
        return [entry for entry in entries if entry in active]
    holder = {index: entry for entry in entries for index in entry.indices}
    chosen = {
        holder[index]
        for index, partner in enumerate(partners(entries[0].group))
        if index in holder and (holder[index] in active or holder[partner] in active)
    }
    return [entry for entry in entries if entry in chosen]


def teams(group: Group, entries: Sequence[Entry]) -> tuple[tuple[Place, Place], ...]:
    """Return the matrices of each A and of its B, expert by expert, for the plan of a step.

    Args:
        group: A group that updates pairs.
        entries: Those of the step; matrices are numbered as in :attr:`Entry.matrices`.

    Raises:
        ValueError: The partner of an A or B is missing.
    """
    places: dict[int, list[Place]] = {}
    for number, entry in enumerate(entries):
        first = 0
        for index in entry.indices:
            count = len(group["matrices"][index])
            places[index] = [(number, first + one) for one in range(count)]
            first += count
    for index, partner in enumerate(partners(group)):
        if index in places and partner not in places:
            raise ValueError(
                f"lora_update={group['lora_update']!r} needs both factors of an adapter in one "
                f"step, and {group['param_names'][partner]} is not in this one: DeepSpeed ZeRO-3 "
                "has put it into another sub-group. Raise sub_group_size in the zero_optimization "
                "section of its config (the default, 1e9, holds the adapters of any model), or use "
                "lora_update='factor'."
            )
    return tuple(
        pair
        for index, partner in enumerate(partners(group))
        if index in places and group["factors"][index] == "A"
        for pair in zip(places[index], places[partner], strict=True)
    )
