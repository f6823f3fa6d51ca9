"""Sequence classification: an encoder with adapters and a new head.

In: settings. Out: a stock ``Trainer``, and facts about model and rows. The head is trained and
saved in full (PEFT's ``modules_to_save``), so the saved adapter holds everything that was trained.
"""

from __future__ import annotations

from typing import Any

import adapters
import datasets
import numpy as np
from peft import get_peft_model
from settings import DataSettings, ModelSettings
from shared import tweets
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)


def build(
    model: ModelSettings, data: DataSettings, args: TrainingArguments
) -> tuple[Trainer, dict[str, Any]]:
    """Return the Trainer, and facts about model and rows."""
    tokenizer = adapters.tokenizer_of(model)
    split = data.split()
    network = adapters.base_model(
        AutoModelForSequenceClassification,
        model,
        num_labels=len(tweets.LABELS),
        id2label=dict(enumerate(tweets.LABELS)),
        label2id={label: number for number, label in enumerate(tweets.LABELS)},
    )
    network = get_peft_model(network, adapters.lora_config(model, "SEQ_CLS", head(network)))
    trainer = Trainer(
        model=network,
        args=args,
        train_dataset=encoded(split.train, tokenizer, data.max_tokens),
        eval_dataset=by_length(encoded(split.validation, tokenizer, data.max_tokens)),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        processing_class=tokenizer,
        optimizers=(adapters.loraplus(model.loraplus_ratio, network, args), None),
    )
    return trainer, adapters.sizes(network) | tweets.facts(split)


def head(network: Any) -> list[str]:
    """Return the modules with parameters that do not belong to the pretrained encoder."""
    return [
        name
        for name, module in network.named_children()
        if name != network.base_model_prefix and any(True for _ in module.parameters())
    ]


def encoded(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> datasets.Dataset:
    """Return the tokens of each row, without padding."""
    tokens = tokenizer(rows["text"][:], truncation=True, max_length=max_tokens)
    return datasets.Dataset.from_dict({**tokens, "labels": rows["label"][:]})


def by_length(rows: datasets.Dataset) -> datasets.Dataset:
    """Return rows of similar length next to each other, so that a batch has little padding."""
    return rows.select(np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable"))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of rows whose label has the largest score."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
