"""What trained the model: ``muon_report.json`` and one sentence for the model card.

In: a :class:`~hf_muon.Muon`. Out: plain data and text, taken from the groups that train, which a
loaded checkpoint may have changed, not from what was asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_muon.optimizer import Muon
from hf_muon.optimizer.groups import STRUCTURE
from hf_muon.optimizer.momentum import window
from hf_muon.rules import FILTERS, rule_of

logger = logging.getLogger(__name__)

FILE_NAME = "muon_report.json"
_PACKAGES = ("hf-muon", "torch", "transformers", "accelerate", "peft", "deepspeed")


def find_muon(optimizer: object) -> Muon | None:
    """The Muon inside the wrappers of accelerate, or None."""
    while optimizer is not None and not isinstance(optimizer, Muon):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def build_report(optimizer: Muon) -> dict[str, Any]:
    """Settings, routes with reasons and fingerprint, what the groups train with, versions.

    ``lr`` of a group is its rate before any schedule, ``scheduled_lr`` the one of this moment.
    """
    return {
        "optimizer": describe(optimizer),
        "config": optimizer.config.to_dict(),
        "groups": [
            {
                **{key: _plain(value) for key, value in group.items() if key not in STRUCTURE},
                "lr": _rate(group),
                "scheduled_lr": float(group["lr"]),
                "parameters": len(group["params"]),
            }
            for group in optimizer.param_groups
        ],
        "routing": optimizer.routes,
        "not_routed": _not_routed(optimizer),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _plain(value: Any) -> Any:
    """What JSON holds: schedulers leave scalars of NumPy and tensors in the groups."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        return value.item()  # of one element
    except (AttributeError, RuntimeError, ValueError):
        return str(value)


def _not_routed(optimizer: Muon) -> list[str]:
    """Parameters that were added to the groups by hand."""
    routed = {route["name"] for route in (optimizer.routes or {}).get("routes", [])}
    names = [name for group in optimizer.param_groups for name in group.get("param_names", [])]
    return [name for name in names if name not in routed]


def write_report(optimizer: Muon, folder: str | Path) -> None:
    """Write ``muon_report.json`` into a folder, which is made if it does not exist.

    A disk that is full or read-only costs the report, with a warning, and not the run; whoever
    reads meanwhile finds the old file or the new one.
    """
    path = Path(folder) / FILE_NAME
    text = json.dumps(build_report(optimizer), indent=1)
    unfinished = path.with_name(f".{FILE_NAME}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        logger.warning("%s could not be written: %s. Training goes on without it.", path, error)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def describe(optimizer: Muon) -> str:
    """The optimizer in one sentence: order, filter and window, polar factor, the AdamW half."""
    group = optimizer.param_groups[0]
    text = f"Muon (hf_muon {_version('hf-muon')}) with order={group['order']}"
    others = {"filter": "ema", "matrix_map": "polar", "rescale": "none"}
    text += "".join(f", {key}={group[key]}" for key, usual in others.items() if group[key] != usual)
    stages = (*rule_of(group).before, *rule_of(group).after)
    if FILTERS["ema"] in stages:
        beta = group["momentum"]
        text += f", momentum beta={beta:g} (window T=1/(1-beta)={window(beta):.4g} steps"
        text += ", Nesterov)" if group["nesterov"] else ")"
    text += f", polar_method={group['polar_method']}"
    if group["polar_method"] != "svd":
        text += f" ({group['coefficients']}, {group['polar_steps']} steps)"
    text += f", adjust_lr={group['adjust_lr']}, lr={_rate(group):g}"
    text += f", weight_decay={group['weight_decay']:g}, for the hidden matrices"
    adamw = next((g for g in optimizer.param_groups if g["algorithm"] == "adamw"), None)
    if adamw:
        beta1, beta2 = adamw["betas"]
        text += f"; AdamW with betas=({beta1:g}, {beta2:g}), eps={adamw['eps']:g}"
        text += f", lr={_rate(adamw):g} for all other parameters"
    return text


def _rate(group: dict[str, Any]) -> float:
    """The learning rate before the scheduler changed it."""
    return float(group.get("initial_lr", group["lr"]))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
