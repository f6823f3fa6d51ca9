"""Param groups as users may pass them, completed and checked.

In: parameters or groups as users write them, and the settings of the optimizer. Out: groups with
plain values, Muon's first, none of them empty.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_muon.config import MuonConfig
from hf_muon.distributed.layout import Matrix
from hf_muon.optimizer.entries import Group
from hf_muon.optimizer.pairs import check_pairs, moves_pairs
from hf_muon.optimizer.scaling import step_size
from hf_muon.values import plain, require_known, typed

# The keys of a group that are neither hyper-parameters nor keys that others keep in it.
STRUCTURE = {
    "params", "param_names", "matrices", "pairs", "factors", "scalings", "fused", "momenta",
    "group_id",
}  # fmt: skip

# torch's names of AdamW's hyper-parameters -> the settings that complete them. Schedulers that
# cycle a momentum (OneCycleLR, CyclicLR) write it into every group; AdamW reads it as β₁.
ADAMW_SETTINGS = {
    "lr": "adamw_lr",
    "betas": "adamw_betas",
    "eps": "adamw_eps",
    "weight_decay": "adamw_weight_decay",
    "momentum": "momentum",
}

# Settings of torch's Muon, AdamW and SGD that would have no effect here.
_OF_OTHERS = {
    "amsgrad", "maximize", "capturable", "differentiable", "dampening", "ns_steps",
    "ns_coefficients", "adjust_lr_fn",
}  # fmt: skip


def make_plain(group: Group) -> None:
    """Convert values to plain types where possible, in place; others may write into a group."""
    for key, value in group.items():
        if key not in STRUCTURE and type(value) not in (float, int, bool, str):
            try:
                group[key] = plain(value)
            except TypeError:
                continue


def named_groups(params: Iterable[Any]) -> list[Group]:
    """Return groups with an algorithm, Muon's first because the Trainer logs the first one's rate.

    Raises:
        TypeError: As in torch's optimizers, for a set, a single tensor, or an item that is not one.
    """
    if isinstance(params, Tensor):
        raise TypeError(
            "params is one tensor; a list of tensors, of (name, tensor), or of groups is expected."
        )
    items = _in_order(params)
    if items and not isinstance(items[0], dict):
        items = [{"params": items}]
    groups = [_with_algorithm(group) for group in items]
    groups = [group for group in groups if group["params"]]
    if not any(group["algorithm"] == "muon" for group in groups):
        raise ValueError(
            "Muon got no matrix to train: pass at least one group with algorithm='muon', or use "
            "torch.optim.AdamW."
        )
    return sorted(groups, key=lambda group: group["algorithm"] != "muon")


def _with_algorithm(group: Any) -> Group:
    """Return the group with its algorithm and a list of parameters, each a tensor or named."""
    if not isinstance(group, dict):
        raise TypeError(f"A param group is a {type(group).__name__}; a dict is expected.")
    algorithm, params = plain(group.get("algorithm", "muon")), group.get("params")
    require_known(str(algorithm), ("muon", "adamw"), "algorithm")
    if params is None:
        raise ValueError(f"A param group has no 'params', only {sorted(group)}.")
    listed = [params] if isinstance(params, Tensor) else list(map(_checked, _in_order(params)))
    return {**group, "algorithm": algorithm, "params": listed}


def _in_order(params: Iterable[Any]) -> list[Any]:
    if isinstance(params, set | frozenset):
        raise TypeError("params is a set, whose order changes between runs; a list is expected.")
    return list(params)


def _checked(item: Any) -> Any:
    tensor = item[1] if isinstance(item, tuple) and len(item) == 2 else item
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"One of the params is a {type(item).__name__}; tensors are expected, or pairs of a "
            "name and a tensor."
        )
    return item if item is tensor else (str(item[0]), tensor)


def complete_group(group: Group, config: MuonConfig) -> Group:
    """Fill in every hyper-parameter that a group does not set itself; check, and make it plain."""
    group = _with_algorithm(group)
    tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    if not tensors:
        raise ValueError("A param group is empty; checkpoints cannot hold empty groups.")
    _check_keys(group, config)
    group.update(hyperparameters(group, config))
    _check_dtypes(group, tensors)
    if group["algorithm"] == "muon":
        given = group.get("matrices") or [_default(p) for p in tensors]
        group["matrices"] = tuple(tuple(map(plain, inside)) for inside in given)
        for key in {"pairs", "factors", "scalings", "momenta"} & group.keys():
            group[key] = tuple(map(plain, group[key]))
        _check_momenta(group, len(tensors))
        _check_cover(group, tensors)
        for inside in set(group["matrices"]):
            for matrix in inside:
                step_size(group["adjust_lr"], Matrix(*matrix))  # raises if it is not defined
        if moves_pairs(group):
            check_pairs(group, [p[0] for p in group["params"] if isinstance(p, tuple)])
    return group


def hyperparameters(group: Group, config: MuonConfig) -> Group:
    """Return a group's hyper-parameters: checked, completed from the settings, and plain.

    Raises:
        ValueError: Names the setting, the value and what is allowed.
    """
    given = {key: value for key, value in group.items() if key not in STRUCTURE}
    make_plain(given)
    if "initial_lr" in given:
        typed("initial_lr", given["initial_lr"], float)
    for configured in _configured(group, config):  # checked when the config was built
        if configured == {**configured, **given}:
            return configured
    if group["algorithm"] == "adamw":
        if "momentum" in given:
            typed("momentum of an AdamW group, its β₁,", given["momentum"], float)
        own = {ADAMW_SETTINGS[key]: given[key] for key in ADAMW_SETTINGS.keys() & given.keys()}
        checked = dataclasses.replace(config, **own)
        cycled = {"momentum": checked.momentum} if "momentum" in given else {}
        return {**given, **checked.adamw_group(), **cycled}
    values = {**config.muon_group(), **given}
    if "momentum" in given and "momentum_weights" not in given:
        values["momentum_weights"] = None  # the config's weights belong to its own momentum
    if values["momentum_dtype"] == "parameter":
        values["momentum_dtype"] = None
    if not values["momentum_warmup_steps"]:
        values["momentum_start"] = None
    values["momentum_weights"] = values["momentum_weights"] or None
    if not values["momentum_cooldown_steps"]:
        values["momentum_end"] = None
    own = {key: values[key] for key in config.muon_group() if key != "algorithm"}
    return {**given, **dataclasses.replace(config, **own).muon_group()}


def _configured(group: Group, config: MuonConfig) -> list[Group]:
    """Return the hyper-parameters of the settings for this algorithm, with and without decay."""
    if group["algorithm"] == "muon":
        return [config.muon_group(decay) for decay in (True, False)]
    if config.adamw_lr is None and config.adjust_lr != "match_rms_adamw":
        return []
    return [config.adamw_group(decay) for decay in (True, False)]


def _check_keys(group: Group, config: MuonConfig) -> None:
    """Raise for another optimizer's name of a setting; unrelated keys (``lr_scale``) are kept."""
    of_muon = set(config.muon_group())
    known = of_muon if group["algorithm"] == "muon" else {"algorithm", *ADAMW_SETTINGS}
    settings = {field.name for field in dataclasses.fields(config)} | of_muon | {*ADAMW_SETTINGS}
    for key in sorted(group.keys() - STRUCTURE - known, key=str):
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.82)
        extended = near and (f"_{near[0]}" in str(key) or f"{near[0]}_" in str(key))
        if key in settings or (key in _OF_OTHERS and group[key]) or (near and not extended):
            require_known(str(key), known, f"key of a group with algorithm={group['algorithm']!r}")
        try:
            plain(group[key])
        except TypeError as error:
            raise ValueError(f"{key} of a param group: {error}.") from None


def _default(parameter: Tensor) -> tuple[Matrix, ...]:
    """Return the matrices of a parameter without routes: itself, or a stack of them."""
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        raise ValueError(
            f"A Muon group holds a parameter of shape {shape}, which is not a matrix. Put it into "
            "a group with algorithm='adamw', or let hf_muon.create_muon_optimizer(model) route "
            "the parameters. Under FSDP1, whose parameters are flat, use FSDP2 (fsdp_version: 2)."
        )
    if len(shape) > 3:
        raise ValueError(
            f"A Muon group holds a parameter of shape {shape}, such as a convolution's kernel, "
            "which is not a stack of matrices. Let hf_muon.create_muon_optimizer(model) flatten "
            "it, give the group 'matrices', or put it into a group with algorithm='adamw'."
        )
    if len(shape) == 2:
        return (Matrix.whole(shape),)
    rows, cols = shape[-2:]
    count = parameter.numel() // max(rows * cols, 1)
    # In a stack, either of the last two dimensions may be fan_out.
    return tuple(Matrix(i * rows * cols, (rows, cols), (cols, 1), None) for i in range(count))


def _check_dtypes(group: Group, tensors: list[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            raise ValueError(
                f"{_name(group, index)} has dtype {tensor.dtype}; real floating-point numbers are "
                "expected."
            )


def _check_momenta(group: Group, count: int) -> None:
    """Raise unless each β that a group gives by parameter is allowed for one parameter."""
    momenta = group.get("momenta")
    if momenta is None:
        return
    if len(momenta) != count or not isinstance(group["momentum"], float):
        raise ValueError(
            f"A Muon group has {count} parameters, momentum={group['momentum']!r} and "
            f"{len(momenta)} entries of 'momenta'; a number for each parameter is expected, which "
            "takes the place of one β."
        )
    for number, momentum in enumerate(momenta):
        if not 0 <= typed(f"momenta[{number}]", momentum, float) < 1:
            raise ValueError(
                f"momenta[{number}]={momentum!r} is out of range: 0 ≤ β < 1 is allowed."
            )
    if group["momentum_warmup_steps"] or group["momentum_cooldown_steps"]:
        raise ValueError(
            "A Muon group gives 'momenta' and a schedule of momentum: use one of them, since a "
            "schedule leads to one β for all."
        )


def _check_cover(group: Group, tensors: list[Tensor]) -> None:
    """Raise unless the matrices cover each parameter and begin at different places in it."""
    if len(group["matrices"]) != len(tensors):
        raise ValueError(
            f"A Muon group has {len(tensors)} parameters and {len(group['matrices'])} entries of "
            "'matrices'; one entry for each parameter is expected."
        )
    for index, (tensor, inside) in enumerate(zip(tensors, group["matrices"], strict=True)):
        matrices = [Matrix(*matrix) for matrix in inside]
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        size = math.prod(shape)
        if not size:
            raise ValueError(
                f"{_name(group, index)} has shape {shape}: a matrix without entries cannot be "
                "trained. Leave it out, or put it into a group with algorithm='adamw'."
            )
        covered = sum(matrix.numel for matrix in matrices)
        distinct = len({matrix.offset for matrix in matrices}) == len(matrices)
        if covered != size or not distinct or any(m.last_index >= size for m in matrices):
            raise ValueError(
                f"The matrices of {_name(group, index)} have {covered} elements and the parameter "
                f"has {size}; they must cover it exactly, without overlap."
            )


def _name(group: Group, index: int) -> str:
    entry = group["params"][index]
    return entry[0] if isinstance(entry, tuple) else f"parameter {index}"
