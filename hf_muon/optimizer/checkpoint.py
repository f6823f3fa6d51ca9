"""Loading a checkpoint: what must match, and what torch's loader would lose.

In: the optimizer's groups and a state dict, after the user's own hooks. Out: a state dict that
torch's loader can use as it is, or an error or a warning that names the differences. Everything is
checked before anything changes. :mod:`~hf_muon.optimizer.buffers` checks the state itself.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_muon.config import MuonConfig
from hf_muon.optimizer.buffers import check_values, step_count
from hf_muon.optimizer.entries import Group
from hf_muon.optimizer.groups import ADAMW_SETTINGS, STRUCTURE, hyperparameters

# Compared elsewhere, or not at all.
_NOT_COMPARED = STRUCTURE | {"lr", "initial_lr", "order", "filter", "rescale"}


def checked(own: Sequence[Group], state_dict: Mapping[str, Any], stepped: bool) -> dict[str, Any]:
    """Return the state dict with complete, plain groups in the optimizer's order, if it all fits.

    Groups are matched by the names of their parameters, or by position and size if one side has no
    names.

    Args:
        own: The optimizer's groups; their settings fill in what an older checkpoint lacks.
        state_dict: The result of ``state_dict()``, possibly after ``torch.distributed.checkpoint``
            (torch 2.13), which turns tuples into lists and numbers into names.
        stepped: Whether the optimizer has state that would be lost.

    Raises:
        ValueError: Other routes, another order, settings out of range, or state that is incomplete,
            not finite, or of another shape. The message names the parameters.
    """
    groups = _matched(own, groups_of(state_dict))
    loaded = [
        _loaded_group(mine, theirs, number)
        for number, (mine, theirs) in enumerate(zip(own, groups, strict=True))
    ]
    state = _loaded_state(own, loaded, state_dict["state"], stepped)
    _warn_of_changes(list(zip(own, loaded, strict=True)), stacklevel=8)
    return {**state_dict, "state": state, "param_groups": loaded}


def check_overwritten(loaded: Group, own: Group, every: Sequence[Group]) -> None:
    """Check one group that a loader has written over; ``own`` and ``every`` are those before.

    Raises:
        ValueError: Names up to five of the parameters that differ, or a setting out of range.
    """
    there = _routes([loaded])
    names = _routes([own]).keys() | there.keys()
    _compare_routes(_routes(every), there, names, absent="in another group")
    _loaded_settings(own, loaded, "A group")
    _warn_of_changes([(own, loaded)], stacklevel=4)


# --- groups -------------------------------------------------------------------------------------


def groups_of(state_dict: Mapping[str, Any]) -> list[Group]:
    """Return the groups of a checkpoint; raise unless they have the form of groups."""
    groups = state_dict.get("param_groups")
    formed = isinstance(state_dict.get("state"), Mapping) and isinstance(groups, list | tuple)
    if not formed or not groups or not all(map(is_group, groups)):
        raise ValueError(
            "The checkpoint is damaged, or is none of an optimizer: a dict of 'state' and of "
            "'param_groups' with 'params' is expected. Use another checkpoint."
        )
    if any("algorithm" not in group for group in groups):
        raise ValueError(
            "The checkpoint holds the state of another optimizer. If that is the Trainer's AdamW, "
            "run `hf-muon convert CHECKPOINT` and resume from what that writes. Else start afresh "
            "(from the Trainer: delete optimizer.pt in the checkpoint; the schedule begins anew "
            "too, unless a callback keeps it, as docs/troubleshooting.md shows), or take over the "
            "state of another Muon with hf_muon.optimizer.import_state."
        )
    return list(groups)


def is_group(group: Any) -> bool:
    """Whether a group of a state dict has the form of one."""
    if not isinstance(group, Mapping) or not _all(group.get("params"), int | str):
        return False
    names, algorithm = group.get("param_names", []), group.get("algorithm", "muon")
    return (
        (isinstance(algorithm, str) and algorithm in ("muon", "adamw"))
        and _all(names, str)
        and _all(group.get("matrices", ()), list | tuple)
    )


def _all(values: Any, kind: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)


def _matched(own: Sequence[Group], saved: list[Group]) -> list[Group]:
    """Return the saved groups in the order of the optimizer's own."""
    named = all("param_names" in group for group in (*own, *saved))
    if named:
        own, saved = without_wrappers(own), without_wrappers(saved)
    # What torch's loader goes by: the names of a group in order, or their number.
    mine, theirs = (
        [tuple(group["param_names"]) if named else len(group["params"]) for group in side]
        for side in (own, saved)
    )
    if named:
        _compare_routes(_routes(own), _routes(saved))
        if mine != theirs and sorted(mine) == sorted(theirs):  # groups were added in another order
            ordered = [saved[theirs.index(names)] for names in mine]
            _warn_of_another_order(saved, ordered)
            return ordered
    if mine != theirs:
        raise ValueError(
            "The checkpoint has the same parameters in other groups or in another order, and "
            "state is loaded by position. Build the optimizer from the same model code and with "
            "the same settings, lr_multipliers among them (its muon_report.json has them)."
            if named
            else f"The checkpoint has groups of {theirs} parameters and this optimizer of {mine}, "
            "and state is loaded by position where parameters have no names. Build the optimizer "
            "from the same model code, or pass model.named_parameters() on both sides."
        )
    if not named:
        labels = list(map(_labels, range(len(own)), own, saved))
        _compare_routes(_routes(own, labels), _routes(saved, labels))
    return saved


def without_wrappers(groups: Sequence[Group]) -> list[Group]:
    """Return groups with names as inside ``torch.compile``, DDP and DataParallel wrappers.

    ``module.`` is taken for a wrapper's prefix only if every name has it.
    """
    names = [[_COMPILED.sub("", name) for name in group["param_names"]] for group in groups]
    while any(names) and all(name.startswith("module.") for of_group in names for name in of_group):
        names = [[name.removeprefix("module.") for name in of_group] for of_group in names]
    pairs = zip(groups, names, strict=True)
    return [{**group, "param_names": of_group} for group, of_group in pairs]


_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")


def _labels(number: int, *groups: Group) -> list[str]:
    """Return the names of a group's tensors if either side has names, else their positions.

    DeepSpeed may have put several parameters into one tensor.
    """
    count = len(groups[0]["params"])
    for group in groups:
        if len(group.get("param_names", ())) == count:
            return list(group["param_names"])
    return [f"tensor {i} of group {number}" for i in range(count)]


def _warn_of_another_order(saved: list[Group], ordered: list[Group]) -> None:
    rates = [[group.get("initial_lr", group.get("lr")) for group in gs] for gs in (saved, ordered)]
    if rates[0] != rates[1]:
        warnings.warn(
            "The checkpoint has the same groups in another order, and they were matched by name. "
            "The state of a learning-rate scheduler goes by position: do not load it, or give its "
            f"base_lrs the order {rates[1]}.",
            stacklevel=9,
        )


def _routes(
    groups: Sequence[Group], labels: Sequence[list[str]] | None = None
) -> dict[str, tuple[str, Any]]:
    """Map each parameter name, or label, to (algorithm, matrices)."""
    routes = {}
    for number, group in enumerate(groups):
        names = labels[number] if labels else group.get("param_names", [])
        matrices = _tuples(group.get("matrices", [()] * len(names)))
        for name, inside in zip(names, matrices, strict=False):
            routes[name] = (group["algorithm"], inside)
    return routes


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _compare_routes(
    mine: dict[str, tuple[str, Any]],
    theirs: dict[str, tuple[str, Any]],
    among: Iterable[str] | None = None,
    absent: str = "absent",
) -> None:
    """Raise if names have other routes; ``absent`` says what a name is that has none there."""
    names = mine.keys() | theirs.keys() if among is None else among
    differing = sorted(name for name in names if mine.get(name) != theirs.get(name))
    if not differing:
        return

    def said(routes: dict[str, tuple[str, Any]], name: str, otherwise: str) -> str:
        algorithm, inside = routes.get(name, (otherwise, ()))
        count = len(inside) if isinstance(inside, tuple) else 0
        if algorithm == "muon":
            return f"Muon ({count} {'matrix' if count == 1 else 'matrices'})"
        return "AdamW" if algorithm == "adamw" else algorithm

    listed = "; ".join(
        f"{name[:90]}: {said(theirs, name, absent)} there, {said(mine, name, 'absent')} here"
        for name in differing[:5]
    )
    more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise ValueError(
        f"The checkpoint's routing differs: {listed}{more}. Load it with the muon_params, "
        "adamw_params, conv, split_fused and split_heads it was trained with (its muon_report.json "
        "has them), or start the optimizer afresh."
    )


def _loaded_group(own: Group, loaded: Group, number: int) -> Group:
    """Return a checkpoint's group with its own settings and this optimizer's structure."""
    structure = {key: own[key] for key in STRUCTURE & own.keys()}
    settings = _loaded_settings(own, loaded, f"Group {number}")
    if "param_names" not in own and len(loaded.get("param_names", ())) == len(loaded["params"]):
        structure["param_names"] = list(loaded["param_names"])  # as torch does
    return {**structure, **settings, "params": list(loaded["params"])}


def _loaded_settings(own: Group, loaded: Group, which: str) -> Group:
    """Return the settings of a loaded group, checked like those of a new one."""
    _check_order(own, loaded)
    if "momentum" in loaded and "momentum_weights" not in loaded:  # from an older version
        own = {key: value for key, value in own.items() if key != "momentum_weights"}
    if "lr_multiplier" not in loaded:  # it has the learning rate of the run
        own = {key: value for key, value in own.items() if key != "lr_multiplier"}
    known = {key: value for key, value in loaded.items() if key not in STRUCTURE}
    if isinstance(known.get("lr"), float) and -1e-12 < known["lr"] < 0:
        known["lr"] = 0.0  # rounding in a schedule that ends at zero
    try:
        return hyperparameters({**own, **known}, MuonConfig(lr=0.0))  # the groups have every value
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"{which} of the checkpoint cannot be used: {str(error)[:700]} Use another "
            "checkpoint, or correct the group in its 'param_groups'."
        ) from error


def _check_order(own: Group, loaded: Group) -> None:
    for key in ("order", "filter", "rescale"):
        if own.get(key) != loaded.get(key, own.get(key)):
            raise ValueError(
                f"The checkpoint was trained with {key}={str(loaded[key])[:90]!r} and this "
                f"optimizer has {key}={own[key]!r}: their buffers hold different things. Use the "
                f"same {key}, or start the optimizer afresh."
            )

    if tuple(own.get("momenta") or ()) != tuple(loaded.get("momenta") or ()):
        raise ValueError(
            f"The checkpoint was trained with momenta={str(loaded.get('momenta'))[:90]}, one β for "
            f"each parameter, and this optimizer has {str(own.get('momenta'))[:90]}: build it with "
            "the same."
        )
    if loaded.get("lora_update", "factor") != "factor" and "pairs" not in own:
        raise ValueError(
            f"The checkpoint was trained with lora_update={str(loaded['lora_update'])[:90]!r}, and "
            "this optimizer does not know which factors are pairs. Build it with that setting."
        )


def _warn_of_changes(groups: list[tuple[Group, Group]], stacklevel: int) -> None:
    """Warn once about the loaded settings that differ from this optimizer's."""
    changed = {text: None for own, loaded in groups for text in _changes(own, loaded)}
    if changed:
        warnings.warn(
            "The checkpoint's settings are used where they differ from this optimizer's: "
            + ", ".join(changed),
            stacklevel=stacklevel,
        )


def _changes(own: Group, loaded: Group) -> list[str]:
    skipped = set(_NOT_COMPARED)
    if not own.get("momentum_warmup_steps") and not loaded.get("momentum_warmup_steps"):
        skipped.add("momentum_start")  # derived from momentum, and unused
    if not own.get("momentum_cooldown_steps") and not loaded.get("momentum_cooldown_steps"):
        skipped.add("momentum_end")
    if "max_momentum" in loaded:
        skipped |= {"momentum", "base_momentum", "max_momentum"}  # a scheduler cycles it
    both = sorted(own.keys() & loaded.keys() - skipped, key=str)
    pairs = [(key, own[key], loaded[key]) for key in both]
    if "initial_lr" in own or "max_lr" not in loaded:  # before any schedule
        mine, theirs = (group.get("initial_lr", group["lr"]) for group in (own, loaded))
        pairs.insert(0, ("lr", mine, theirs))
    adamw = own["algorithm"] == "adamw"
    return [
        f"{ADAMW_SETTINGS.get(key, key) if adamw else key}={theirs!r} (not {mine!r})"
        for key, mine, theirs in pairs
        if isinstance(theirs, str | float | int | tuple) and mine != theirs
    ]


# --- state --------------------------------------------------------------------------------------


def _loaded_state(
    own: Sequence[Group], loaded: Sequence[Group], saved: Mapping[Any, Any], stepped: bool
) -> dict[Any, Any]:
    """Return the state of a checkpoint, with step counts as tensors and without empty entries."""
    state, missing, trained = dict(saved), [], 0
    indices = [index for group in loaded for index in group["params"]]
    if len(set(indices)) != len({id(p) for group in own for p in group["params"]}):
        raise ValueError(
            "The checkpoint is damaged: a parameter stands twice in its groups. Use another one."
        )
    for number, (mine, theirs) in enumerate(zip(own, loaded, strict=True)):
        names = _labels(number, theirs)
        for name, p, index in zip(names, mine["params"], theirs["params"], strict=True):
            entry = state.get(index)
            if entry is None or (isinstance(entry, Mapping) and not entry):
                state.pop(index, None)
                missing += [name] if p.requires_grad else []
            else:
                check_values(name, theirs, p, entry)
                state[index] = {**entry, "step": step_count(entry["step"])}
            trained += p.requires_grad
    if missing and (stepped or len(missing) < trained):  # else it was saved before its first step
        listed = ", ".join(name[:90] for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        warnings.warn(
            f"The checkpoint holds no state for {len(missing)} of {trained} trained parameters: "
            f"{listed}{more}. Their momentum starts from zero.",
            stacklevel=8,
        )
    return state
