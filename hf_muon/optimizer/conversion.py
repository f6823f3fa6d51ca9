"""Conversion of state between the Trainer's AdamW and Muon.

In: the state dicts of an optimizer and of its schedule, and the model's parameters by name. Out:
the state dicts with which the other optimizer continues. The inputs are not changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_muon.config import MuonConfig
from hf_muon.optimizer.buffers import (
    buffer_dtype,
    buffers_of,
    check_values,
    new_state,
    step_count,
)
from hf_muon.optimizer.checkpoint import groups_of
from hf_muon.optimizer.entries import Entry, Group
from hf_muon.optimizer.groups import hyperparameters
from hf_muon.optimizer.importer import filters_by_one_average
from hf_muon.optimizer.muon import Muon

Named = Sequence[tuple[str, Tensor]]  # parameters; they may be on the meta device
State = dict[str, Tensor]

_OF_ADAMW = ("step", "exp_avg", "exp_avg_sq")
_ADAMW = {"algorithm": "adamw"}
_DEFAULTS = MuonConfig(lr=0.0).muon_group()
_TYPICAL = 0.2  # RMS of AdamW's updates, and of Muon's under match_rms_adamw
_TINY = torch.finfo(torch.float64).tiny


def to_muon(
    state_dict: Mapping[str, Any], parameters: Sequence[Named], optimizer: Muon
) -> dict[str, Any]:
    """Return the state dict of a Muon that continues where the Trainer's AdamW stopped.

    Parameters that AdamW trains in both keep their state. If the rule filters gradients by one
    average, a matrix starts with AdamW's first moment, which is the same M ← βM + (1−β)G with
    AdamW's β₁. All other state starts at zero, including the step count of a matrix.

    Args:
        state_dict: AdamW's state dict.
        parameters: Parameters with weight decay under the Trainer, then the others, both in the
            model's order.
        optimizer: The Muon to continue with, built for the same model, on any device.

    Raises:
        ValueError: The state does not come from the Trainer's AdamW for this model.
    """
    found = _states_of_adamw(state_dict, parameters)
    result = optimizer.state_dict()
    for group, saved in zip(optimizer.param_groups, result["param_groups"], strict=True):
        takes_average = group["algorithm"] == "muon" and keeps_average(group)
        for position, (name, index) in enumerate(
            zip(group["param_names"], saved["params"], strict=True)
        ):
            entry = _entry(group, group["params"][position], position)
            state, given = new_state(entry), found.get(name)
            if given is not None and group["algorithm"] == "adamw":
                state = {key: given[key] for key in _OF_ADAMW}
            elif given is not None and takes_average:
                (buffer,) = (one for one in buffers_of(group) if one.name == "exp_avg")
                state["exp_avg"] = given["exp_avg"].to(buffer_dtype(group, entry.tensor, buffer))
            result["state"][index] = state
    return result


def to_adamw(
    state_dict: Mapping[str, Any],
    parameters: Sequence[Named],
    settings: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the state dict of the Trainer's AdamW that continues where Muon stopped.

    Parameters that AdamW trains in both keep their state. A matrix for which Muon kept one average
    of its gradients starts with the state from :func:`as_after_a_window`; other matrices start as
    at AdamW's first step.

    Args:
        state_dict: Muon's state dict.
        parameters: As in :func:`to_muon`; each list is a group.
        settings: Settings of each group, as ``torch.optim.AdamW`` takes them.

    Raises:
        ValueError: The state does not come from Muon for this model.
    """
    found = _states_of_muon(state_dict, parameters)
    state, groups, index = {}, [], 0
    for members, own in zip(parameters, settings, strict=True):
        groups.append({**own, "params": list(range(index, index + len(members)))})
        for name, parameter in members:
            group, given = found[name]
            state[index] = new_state(_entry(_ADAMW, parameter))
            if given and group["algorithm"] == "adamw":
                state[index] = {key: given[key] for key in _OF_ADAMW}
            elif given and keeps_average(group) and given["step"] > 0:
                begun = as_after_a_window(given, group["momentum"], own["betas"])
                state[index] |= {key: value.to(parameter.dtype) for key, value in begun.items()}
                state[index]["step"] = begun["step"]
            index += 1
    return {"state": state, "param_groups": groups}


def as_after_a_window(
    state: Mapping[str, Tensor], beta: float, betas: tuple[float, float]
) -> dict[str, Tensor]:
    """Return AdamW's state of a matrix as if it had seen the gradients in Muon's window.

    Their mean is M̂ = M/(1−βᵗ). Their mean squares V̂ are unknown. As an estimate, the squares of M̂
    are replaced by products of row and column means (Adafactor, arXiv 1804.04235) and divided by
    0.2², because AdamW's updates M̂/√V̂ typically have RMS 0.2 (arXiv 2502.16982, eq. 4). Both
    moments are set so that bias correction after s = min(t, 1/(1−β)) steps gives M̂ and V̂. New
    gradients soon outweigh the estimate.

    Args:
        state: Muon's state of the matrix: M as ``exp_avg``, and t > 0 as ``step``.
        beta: Muon's β.
        betas: AdamW's β₁ and β₂.
    """
    t = float(state["step"])
    s = min(t, round(1 / (1 - beta)))
    mean = state["exp_avg"].double() / (1 - beta**t)  # float64 holds its squares
    squares = mean.flatten(1).square() if mean.ndim > 3 else mean.square()  # (…, m, n)
    rows, cols = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
    both = rows / squares.mean((-2, -1), keepdim=True).clamp_min(_TINY) * cols
    return {
        "step": step_count(s),
        "exp_avg": (1 - betas[0] ** s) * mean,
        "exp_avg_sq": (1 - betas[1] ** s) * both.view_as(mean) / _TYPICAL**2,
    }


def reschedule(schedule: Mapping[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """Return the state of a schedule for other groups, each at the same share of its peak rate.

    Args:
        schedule: State of a ``LambdaLR``; all schedules of transformers are of this class, except
            those that follow the loss.
        groups: The new groups, changed in place. Their ``lr`` is the rate before any schedule; it
            moves to ``initial_lr``, and ``lr`` becomes the scheduled rate.

    Raises:
        ValueError: The schedule does not multiply all rates by the same number.
    """
    bases, rates = _numbers(schedule.get("base_lrs")), _numbers(schedule.get("_last_lr"))
    factors = schedule.get("lr_lambdas") or []
    if not bases or not len(bases) == len(rates) == len(factors):
        raise ValueError(
            "scheduler.pt does not hold a schedule that multiplies each group's own rate, as "
            "LambdaLR and all of transformers do that do not follow the loss; it holds "
            f"{sorted(map(str, schedule))}. Start a new run from the weights, with a schedule of "
            "its own."
        )
    known = [(rate, base) for rate, base in zip(rates, bases, strict=True) if base]
    rate, base = known[0] if known else (0.0, 1.0)
    same = all(math.isclose(r * base, rate * b, rel_tol=1e-9, abs_tol=1e-18) for r, b in known)
    if not same or any(factor != factors[0] for factor in factors):
        raise ValueError(
            f"The groups of the checkpoint follow different schedules: rates {rates} of {bases}. "
            "Which of them the new groups follow is not known: start a new run from the weights."
        )
    for group in groups:
        group["initial_lr"] = group["lr"]
        group["lr"] = rate * (group["initial_lr"] / base)
    return {
        **schedule,
        "base_lrs": [group["initial_lr"] for group in groups],
        "_last_lr": [group["lr"] for group in groups],
        "lr_lambdas": [factors[0]] * len(groups),
    }


def _numbers(values: Any) -> list[float]:
    """Return values as floats; an empty list if they are not a list of numbers."""
    try:
        return list(map(float, values))
    except (TypeError, ValueError):
        return []


def keeps_average(group: Group) -> bool:
    """Return whether a group keeps one average of gradients, in a dtype that can be copied."""
    group = {**_DEFAULTS, **group}  # an older version may have written the group
    return filters_by_one_average(group) and group["momentum_dtype"] != "int8"


def _entry(group: Group, parameter: Tensor, position: int = 0) -> Entry:
    """Return an entry for one parameter, without touching its memory before it is written."""
    return Entry(group, torch.empty_like(parameter, device="cpu"), (position,))


def _states_of_adamw(
    state_dict: Mapping[str, Any], parameters: Sequence[Named]
) -> dict[str, State]:
    """Return each parameter's state by name; the groups of the Trainer's AdamW have no names."""
    indices = [group["params"] for group in state_dict["param_groups"]]
    sizes, expected = ([len(one) for one in kind] for kind in (indices, parameters))
    if sizes != expected:
        raise ValueError(
            f"The optimizer's groups have {sizes} parameters; the Trainer's AdamW has {expected} "
            "for this model, decayed ones and others. Parameters that were frozen, groups of a "
            "Trainer of your own and other models cannot be told apart: start a new run from the "
            "weights."
        )
    found = {}
    for members, of_group in zip(parameters, indices, strict=True):
        for (name, parameter), index in zip(members, of_group, strict=True):
            if state := state_dict["state"].get(index):
                _check(name, _ADAMW, state, parameter)
                found[name] = state
    return found


def _check(name: str, group: Group, state: Mapping[str, Any], parameter: Tensor) -> None:
    """Raise if state does not belong to a parameter, or has values that cannot be trained with."""
    if group is _ADAMW and not all(isinstance(state.get(key), Tensor) for key in _OF_ADAMW):
        raise ValueError(
            f"The state of {name[:90]} holds {sorted(map(str, state))}; AdamW's step, exp_avg and "
            "exp_avg_sq are expected. 8-bit and other optimizers cannot be converted: start a new "
            "run from the weights."
        )
    for key in state.keys() & {"exp_avg", "exp_avg_sq"}:
        shape = getattr(state[key], "shape", parameter.shape)
        if shape != parameter.shape:
            raise ValueError(
                f"{key!r} in the state of {name[:90]} has shape {tuple(shape)} and the "
                f"parameter {tuple(parameter.shape)}: the checkpoint is of another model. Name "
                "its own with --model."
            )
    check_values(name, group, torch.empty_like(parameter, device="cpu"), state)


def _checked(group: Group) -> Group:
    """Return a group with defaults for missing settings; its rates are checked elsewhere."""
    given = {key: value for key, value in group.items() if key not in ("lr", "initial_lr")}
    return {**group, **hyperparameters(given, MuonConfig(lr=0.0)), "lr": group.get("lr")}


def _states_of_muon(
    state_dict: Mapping[str, Any], parameters: Sequence[Named]
) -> dict[str, tuple[Group, Mapping[str, Tensor]]]:
    """Return the group and the state of each parameter by name."""
    groups = groups_of(state_dict)
    if any("param_names" not in group for group in groups):
        raise ValueError(
            "The checkpoint does not name its parameters, so that they cannot be matched. Only "
            "what create_muon_optimizer has built, as the Trainer's, can be converted."
        )
    found = {
        name: (group, state_dict["state"].get(index, {}))
        for group in map(_checked, groups)
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    wanted = dict(one for members in parameters for one in members)
    if differing := sorted(wanted.keys() ^ found.keys()):
        raise ValueError(
            f"The checkpoint and the model do not train the same parameters: {differing[0][:90]} "
            f"is in one of them only, as {len(differing) - 1} more. Name the model it was trained "
            "with by --model."
        )
    for name, (group, state) in found.items():
        if state:
            _check(name, group, state, wanted[name])
    return found
