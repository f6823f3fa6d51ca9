"""The competitors on nanoGPT's benchmark: AdamW as published, and arms that are searched.

Each arm has three learning rates (matrices; embeddings and head; norms), momentum and weight decay.
All are searched under the same budget; nothing else differs between the arms.
"""

from __future__ import annotations

from study.harness import Arm

PUBLISHED = {
    "rate": 1e-3,
    "embedding_rate": 1e-3,
    "rest_rate": 1e-3,
    "momentum": 0.9,  # β₁; β₂ is 0.99
    "weight_decay": 0.01,
}
"""As of commit 23a8e701, which published the loss, but that embeddings decay as well."""
BEGIN = {**PUBLISHED, "embedding_rate": 4e-3, "rest_rate": 4e-3, "weight_decay": 0.1}
"""Where AdamW's search begins, after the published point; Muon's differ in rate and momentum."""

AXES = {
    "rate": 2.0,
    "embedding_rate": 2.0,
    "momentum": (0.0, 0.5, 0.8, 0.9, 0.95, 0.98),
    "weight_decay": (0.01, 0.1, 0.3, 1.0),
    "rest_rate": 2.0,
}
WITHOUT_MOMENTUM = {name: axis for name, axis in AXES.items() if name != "momentum"}


def muon(start: float = 2e-3, axes: dict[str, object] = AXES, **settings: object) -> Arm:
    """Return an arm that differs from Muon's defaults in its settings."""
    point = {**BEGIN, "rate": start, "momentum": 0.95}
    if axes is WITHOUT_MOMENTUM:
        del point["momentum"]
    return Arm({"optimizer": "muon", "coefficients": "tight", **settings}, point, axes)


BETAS = {"momentum": (0.8, 0.9, 0.95, 0.98), "momentum_weights": (0.25,) * 4, "nesterov": False}
REFERENCE = "adamw"
ARMS = {
    "adamw_published": Arm({"optimizer": "adamw"}, PUBLISHED, {}),
    REFERENCE: Arm({"optimizer": "adamw"}, BEGIN, AXES, [PUBLISHED]),
    "muon": muon(),
    "post_polar": muon(3.2e-2, order="post_polar", nesterov=False),
    "polar_only": muon(1.6e-2, WITHOUT_MOMENTUM, order="polar_only"),
    "four_terms": muon(axes=WITHOUT_MOMENTUM, **BETAS),
    "normuon": muon(rescale="rows"),
    "split_qkv": muon(split_fused=True),
    # The control: matrices stay at their initial values.
    "untrained": muon(0.0, {"embedding_rate": 2.0, "rest_rate": 2.0}),
}
BUDGET = 24
"""Points that the search of each arm may try."""
