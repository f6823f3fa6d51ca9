"""Param groups: what users may pass, completed and checked.

In: parameters or groups as users write them, and the settings of the optimizer. Out: groups whose
values are plain, Muon's first, none of them empty.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_muon.config import MuonConfig
from hf_muon.distributed.layout import Matrix
from hf_muon.optimizer.adamw import has_fused_kernel
from hf_muon.optimizer.pairs import check_pairs, moves_pairs
from hf_muon.optimizer.scaling import step_size
from hf_muon.values import require_known

Group = dict[str, Any]

# What a group holds besides hyper-parameters: torch's own keys, the schedulers' and the routes'.
_STRUCTURE = {
    "params", "param_names", "algorithm", "initial_lr", "matrices", "pairs", "factors", "scalings",
    "fused", "group_id",
}  # fmt: skip

# torch's names of AdamW's hyper-parameters -> the settings that complete them.
_ADAMW_SETTINGS = {
    "lr": "adamw_lr",
    "betas": "adamw_betas",
    "eps": "adamw_eps",
    "weight_decay": "adamw_weight_decay",
}


def named_groups(params: Iterable[Any]) -> list[Group]:
    """Groups with an algorithm, Muon's first because the Trainer logs the first one's rate."""
    items = list(params)
    if items and not isinstance(items[0], dict):
        items = [{"params": items}]
    groups = [{"algorithm": "muon", **group, "params": _as_list(group)} for group in items]
    groups = [group for group in groups if group["params"]]
    if not any(group["algorithm"] == "muon" for group in groups):
        for group in groups:
            require_known(group["algorithm"], ("muon", "adamw"), "algorithm")
        raise ValueError(
            "Muon got no matrix to train: pass at least one group with algorithm='muon', or use "
            "torch.optim.AdamW."
        )
    return sorted(groups, key=lambda group: group["algorithm"] != "muon")


def _as_list(group: Group) -> list[Any]:
    params = group.get("params")
    if params is None:
        raise ValueError(f"A param group has no 'params', only {sorted(group)}.")
    return [params] if isinstance(params, Tensor) else list(params)


def complete_group(group: Group, config: MuonConfig) -> Group:
    """The group with every hyper-parameter that it does not give itself, checked."""
    group = {"algorithm": "muon", **group, "params": _as_list(group)}
    require_known(group["algorithm"], ("muon", "adamw"), "algorithm")
    muon = group["algorithm"] == "muon"
    given = {key: value for key, value in group.items() if key not in _STRUCTURE}
    group = {**group, **(_muon_settings(given, config) if muon else _adamw_settings(given, config))}
    tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    if not tensors:
        raise ValueError("A param group is empty; checkpoints cannot hold empty groups.")
    _check_dtypes(group, tensors)
    if muon:
        group["matrices"] = _plain(group.get("matrices") or [_default(p) for p in tensors])
        _check_cover(group, tensors)
        for inside in set(group["matrices"]):
            for matrix in inside:
                step_size(group["adjust_lr"], Matrix(*matrix))  # raises where it cannot be known
        if moves_pairs(group):
            check_pairs(group, [p[0] for p in group["params"] if isinstance(p, tuple)])
    else:
        group.setdefault("fused", has_fused_kernel(tensors))
    return group


def _muon_settings(given: Group, config: MuonConfig) -> Group:
    defaults = config.muon_group()
    for key in given:
        require_known(key, defaults, "key of a group with algorithm='muon'")
    values = {**defaults, **given}
    dataclasses.replace(config, **_as_settings(values))
    return values


def _as_settings(values: Group) -> Group:
    """Group values under the names and in the form of MuonConfig, so that it can check them."""
    settings = {key: value for key, value in values.items() if key != "algorithm"}
    if settings["momentum_dtype"] == "parameter":
        settings["momentum_dtype"] = None
    if not settings["momentum_warmup_steps"]:
        settings["momentum_start"] = None
    return settings


def _adamw_settings(given: Group, config: MuonConfig) -> Group:
    for key in given:
        require_known(key, _ADAMW_SETTINGS, "key of a group with algorithm='adamw'")
    own = {_ADAMW_SETTINGS[key]: value for key, value in given.items()}
    return dataclasses.replace(config, **own).adamw_group()


def _default(parameter: Tensor) -> tuple[Matrix, ...]:
    """The matrices of a parameter that came without routes: itself, or a stack of them."""
    shape = tuple(parameter.shape)
    if len(shape) < 2:
        raise ValueError(
            f"A Muon group holds a parameter of shape {shape}, which is not a matrix. Put it into "
            "a group with algorithm='adamw', or let hf_muon.create_muon_optimizer(model) route "
            "the parameters. Under FSDP1, whose parameters are flat, use FSDP2 (fsdp_version: 2)."
        )
    if len(shape) == 2:
        return (Matrix.whole(shape),)
    rows, cols = shape[-2:]
    count = parameter.numel() // max(rows * cols, 1)
    # A stack does not say which of its last two dimensions is fan_out.
    return tuple(Matrix(i * rows * cols, (rows, cols), (cols, 1), None) for i in range(count))


def _plain(matrices: Iterable[Iterable[Matrix]]) -> tuple[Any, ...]:
    """Nested plain tuples: checkpoints are read with ``weights_only=True``."""
    return tuple(
        tuple((m[0], tuple(m[1]), tuple(m[2]), m[3]) for m in inside) for inside in matrices
    )


def _check_dtypes(group: Group, tensors: list[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            raise ValueError(
                f"{_name(group, index)} has dtype {tensor.dtype}; real floating-point numbers are "
                "expected."
            )


def _check_cover(group: Group, tensors: list[Tensor]) -> None:
    """Each parameter is covered by matrices that begin at different places inside it."""
    if len(group["matrices"]) != len(tensors):
        raise ValueError(
            f"A Muon group has {len(tensors)} parameters and {len(group['matrices'])} entries of "
            "'matrices'; one entry for each parameter is expected."
        )
    for index, (tensor, inside) in enumerate(zip(tensors, group["matrices"], strict=True)):
        matrices = [Matrix(*matrix) for matrix in inside]
        size = math.prod(getattr(tensor, "ds_shape", tensor.shape))
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
