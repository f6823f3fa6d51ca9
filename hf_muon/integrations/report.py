"""What trained the model: ``muon_report.json`` and one sentence for the model card.

In: a :class:`~hf_muon.Muon`. Out: plain data and text, taken from the groups that train, which a
loaded checkpoint may have changed, not from what was asked for.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_muon.optimizer import Muon
from hf_muon.optimizer.momentum import window

FILE_NAME = "muon_report.json"
_PACKAGES = ("hf-muon", "torch", "transformers", "accelerate", "peft", "deepspeed")
_NOT_REPORTED = {
    "params", "param_names", "matrices", "pairs", "factors", "scalings", "group_id",
}  # fmt: skip


def find_muon(optimizer: object) -> Muon | None:
    """The Muon inside the wrappers of accelerate, or None."""
    while optimizer is not None and not isinstance(optimizer, Muon):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def build_report(optimizer: Muon) -> dict[str, Any]:
    """Routes with reasons and fingerprint, hyper-parameters of each group, package versions."""
    return {
        "optimizer": describe(optimizer),
        "groups": [
            {
                **{key: value for key, value in group.items() if key not in _NOT_REPORTED},
                "parameters": len(group["params"]),
            }
            for group in optimizer.param_groups
        ],
        "routing": optimizer.routes,
        "not_routed": _not_routed(optimizer),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _not_routed(optimizer: Muon) -> list[str]:
    """Parameters that were added to the groups by hand."""
    routed = {route["name"] for route in (optimizer.routes or {}).get("routes", [])}
    names = [name for group in optimizer.param_groups for name in group.get("param_names", [])]
    return [name for name in names if name not in routed]


def write_report(optimizer: Muon, folder: str | Path) -> None:
    """Write ``muon_report.json`` into a folder, which is made if it does not exist."""
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(build_report(optimizer), indent=1), encoding="utf-8")


def describe(optimizer: Muon) -> str:
    """The optimizer in one sentence: order, filter and window, polar factor, the AdamW half."""
    group = optimizer.param_groups[0]
    text = f"Muon (hf_muon {_version('hf-muon')}) with order={group['order']}"
    if group["order"] != "polar_only":
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
