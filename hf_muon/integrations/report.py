"""How the model was trained: ``muon_report.json`` and one sentence for the model card.

In: a :class:`~hf_muon.Muon`. Out: plain data and text, from the groups that actually train; a
loaded checkpoint may have changed them since they were configured.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_muon.optimizer import Muon
from hf_muon.optimizer.auto_momentum import MOMENTA
from hf_muon.optimizer.groups import STRUCTURE
from hf_muon.optimizer.momentum import weights_of, window
from hf_muon.rules import rule_of

logger = logging.getLogger(__name__)

FILE_NAME = "muon_report.json"
_LEFT_OUT = {*STRUCTURE} - {"momenta"}
_PACKAGES = ("hf-muon", "torch", "transformers", "accelerate", "peft", "deepspeed")


def find_muon(optimizer: object) -> Muon | None:
    """Return the Muon inside the wrappers of accelerate, or None."""
    while optimizer is not None and not isinstance(optimizer, Muon):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def build_report(optimizer: Muon) -> dict[str, Any]:
    """Return settings, routes with reasons and fingerprint, the groups' values, and versions.

    A group's ``lr`` is its learning rate before any schedule; ``scheduled_lr`` is the current one.
    """
    return {
        "optimizer": describe(optimizer),
        "config": optimizer.config.to_dict(),
        "groups": [
            {
                **{key: _plain(value) for key, value in group.items() if key not in _LEFT_OUT},
                "lr": float(group.get("initial_lr", group["lr"])),
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
    """Return a value that JSON can hold; schedulers leave NumPy scalars and tensors in groups."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        return value.item()  # it has one element
    except (AttributeError, RuntimeError, ValueError):
        return str(value)


def _not_routed(optimizer: Muon) -> list[str]:
    """Return the names of parameters that were added to the groups by hand."""
    routed = {route["name"] for route in (optimizer.routes or {}).get("routes", [])}
    names = [name for group in optimizer.param_groups for name in group.get("param_names", [])]
    return [name for name in names if name not in routed]


def write_report(optimizer: Muon, folder: str | Path) -> Path | None:
    """Write ``muon_report.json`` into a folder, which is created if it does not exist.

    If the disk is full or read-only, this warns and the run continues. The file is replaced
    atomically: a reader sees the old one or the new one.

    Returns:
        The file; None if it could not be written.
    """
    path = Path(folder) / FILE_NAME
    text = json.dumps(build_report(optimizer), indent=1)
    unfinished = path.with_name(f".{FILE_NAME}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
        return path
    except OSError as error:
        logger.warning("%s could not be written: %s. Training goes on without it.", path, error)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        return None


def describe(optimizer: Muon) -> str:
    """Describe the optimizer in a sentence: rule, filter and window, polar factor, AdamW half."""
    group = optimizer.param_groups[0]
    text = f"Muon (hf_muon {_version('hf-muon')}) with order={group['order']}"
    for key, usual in _RULE.items():
        text += f", {key}={group[key]}{_number_of(key, group)}" if group[key] != usual else ""
    text += ", match_update_rms=true" if group["match_update_rms"] else ""
    text += _momentum(group)
    if not rule_of(group).whole.decomposes:  # such a map takes its own SVD
        text += f", polar_method={group['polar_method']}"
        if group["polar_method"] != "svd":
            text += f" ({group['coefficients']}, {group['polar_steps']} steps)"
    if group["step_rule"] == "additive":  # other step rules have no step-size factor
        text += f", adjust_lr={group['adjust_lr']}"
    text += f", lr={rate_of('muon', optimizer, 'initial_lr') or 0:g}"
    if group["step_rule"] != "hyperball":
        text += f", weight_decay={group['weight_decay']:g}"
    text += ", for the hidden matrices"
    adamw = next((g for g in optimizer.param_groups if g["algorithm"] == "adamw"), None)
    if adamw:
        beta1, beta2 = adamw.get("momentum", adamw["betas"][0]), adamw["betas"][1]
        text += f"; AdamW with betas=({beta1:g}, {beta2:g}), eps={adamw['eps']:g}"
        text += f", lr={rate_of('adamw', optimizer, 'initial_lr') or 0:g} for all other parameters"
    factors = sorted({g["lr_multiplier"] for g in optimizer.param_groups if "lr_multiplier" in g})
    if factors:
        text += f"; rates times {_joined(factors, ', ')} for what lr_multipliers names"
    return text


# Settings that are described if they differ from this value, with the number that belongs to each.
_RULE = {
    "prefilter": "none",
    "filter": "ema",
    "matrix_map": "polar",
    "rescale": "none",
    "step_rule": "additive",
    "lora_update": "factor",
}
_NUMBERS = {
    "clip": "prefilter_threshold",
    "soft": "map_power",
    "rows": "rescale_beta",
    "entries": "rescale_beta",
}


def _number_of(key: str, group: dict[str, Any]) -> str:
    name = _NUMBERS.get(group[key])
    return f" ({name} {group[name]:g})" if name else ""


def _momentum(group: dict[str, Any]) -> str:
    """Describe the package's filter, its window and schedule; empty for a registered filter."""
    if group["order"] == "polar_only" or group["filter"] != "ema":
        return ""
    momentum, ahead = group["momentum"], ", Nesterov" if group["nesterov"] else ""
    if momentum == "auto":
        text = f", momentum=auto (of each matrix one of {_joined(MOMENTA, ', ')}{ahead})"
    elif isinstance(momentum, tuple):
        weights = weights_of(group)
        age = sum(w * (window(beta) - 1) for w, beta in zip(weights, momentum, strict=True))
        text = f", momentum betas={_joined(momentum)} with weights {_joined(weights)}"
        text += f" (mean age {age:.4g} steps{ahead})"
    elif momenta := group.get("momenta"):
        text = f", momentum beta from {min(momenta):g} to {max(momenta):g}, by parameter"
        text += f" ({ahead.removeprefix(', ')})" if ahead else ""
    else:
        text = f", momentum beta={momentum:g} (window T=1/(1-beta)={window(momentum):.4g} steps"
        text += f"{ahead})"
    return text + _schedule(group)


def _schedule(group: dict[str, Any]) -> str:
    warmup, cooldown = group["momentum_warmup_steps"], group["momentum_cooldown_steps"]
    text = f", from {_joined(group['momentum_start'])} over {warmup} steps" if warmup else ""
    if cooldown:
        text += f", to {_joined(group['momentum_end'])} over {cooldown} steps from step "
        text += f"{group['momentum_cooldown_start']} on"
    kind = f" ({group['momentum_schedule']})" if warmup or cooldown else ""
    chosen = group["momentum_dtype"]
    return text + kind + (f", momentum_dtype={chosen}" if chosen != "parameter" else "")


def _joined(numbers: float | Sequence[float], by: str = ":") -> str:
    of = numbers if isinstance(numbers, Sequence) else [numbers]
    return by.join(f"{number:.4g}" for number in of)


def rate_of(algorithm: str, optimizer: Muon, key: str = "lr") -> float | None:
    """Return the learning rate that lr_multipliers multiplies in one half, if it trains anything.

    Args:
        algorithm: The half, ``muon`` or ``adamw``.
        optimizer: The optimizer.
        key: ``lr``, the current rate, or ``initial_lr``, that before any schedule.
    """
    for group in optimizer.param_groups:
        factor: float = group.get("lr_multiplier", 1.0)
        if group["algorithm"] == algorithm and factor:
            return float(group.get(key, group["lr"])) / factor
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
