"""A model card that names the optimizer truthfully.

In: the Trainer at the end of a run. Out: its "optimizer" line. transformers (5.23) writes that line
from ``TrainingArguments`` alone, which say nothing of defaults, and name AdamW when the optimizer
came through ``optimizer_cls_and_kwargs``. No callback runs after the card is written, so the
function that collects the line is wrapped.
"""

from __future__ import annotations

import functools
from typing import Any

from hf_muon.integrations.report import describe, find_muon


def describe_in_model_cards() -> None:
    """Let model cards of runs with our optimizer describe it; others stay as they are."""
    from transformers import modelcard

    original: Any = modelcard.extract_hyperparameters_from_trainer
    if getattr(original, "_from_hf_muon", False):
        return

    @functools.wraps(original)
    def extract_hyperparameters_from_trainer(trainer: Any) -> dict[str, Any]:
        hyperparameters: dict[str, Any] = original(trainer)
        optimizer = find_muon(trainer.optimizer)
        if optimizer is not None:
            hyperparameters["optimizer"] = describe(optimizer)
        return hyperparameters

    described: Any = extract_hyperparameters_from_trainer
    described._from_hf_muon = True
    modelcard.extract_hyperparameters_from_trainer = described
