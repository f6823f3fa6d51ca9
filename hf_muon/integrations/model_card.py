"""A model card that names the optimizer correctly.

In: the Trainer at the end of a run. Out: the "optimizer" line of its model card. transformers
(5.23) writes that line from ``TrainingArguments`` alone, which do not contain our defaults, and
which say AdamW if the optimizer came through ``optimizer_cls_and_kwargs``. No callback runs after
the card is written, so the function that collects the line is wrapped.
"""

from __future__ import annotations

import functools
from typing import Any

from hf_muon.integrations.report import describe, find_muon


def describe_in_model_cards() -> None:
    """Make model cards describe our optimizer if the run used it; others stay unchanged."""
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
