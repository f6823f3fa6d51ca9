"""Supervised fine-tuning of a causal model with TRL's ``SFTTrainer``.

In: settings with the names of a Hub model and a Hub dataset (or folders); the dataset is one that
TRL knows: conversations, prompts with completions, or plain text. Out: the Trainer, and facts about
model and rows.
"""

from __future__ import annotations

from typing import Any

import adapters
import datasets
from peft import get_peft_model
from settings import DataSettings, ModelSettings
from shared.arguments import RecipeError
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def build(
    model: ModelSettings, data: DataSettings, args: TrainingArguments
) -> tuple[Trainer, dict[str, Any]]:
    """Return the Trainer, and what is reported of model and rows; ``args`` is an ``SFTConfig``."""
    from trl import SFTTrainer  # the other tasks do without TRL

    tokenizer = adapters.tokenizer_of(model)
    train, validation = load(data)
    # The base keeps the dtype it was saved in; PEFT holds adapters in float32.
    network = adapters.base_model(AutoModelForCausalLM, model, dtype="auto")
    network = get_peft_model(network, adapters.lora_config(model, "CAUSAL_LM"))
    trainer = SFTTrainer(
        model=network,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        optimizers=(adapters.loraplus(model.loraplus_ratio, network, args), None),
    )
    rows = {"train_rows": len(train), "validation_rows": len(validation)}
    return trainer, adapters.sizes(network) | rows


def load(data: DataSettings) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return training rows, and ``validation_rows`` that are held out.

    They are the first of the dataset's validation or test split, or the first of its train split
    where it has neither.

    Raises:
        RecipeError: the dataset cannot be opened, or has too few rows.
    """
    try:
        parts = datasets.load_dataset(data.dataset, data.dataset_config)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"The dataset {data.dataset!r} could not be opened: {error} A dataset of the Hub needs "
            "the network (and HF_HUB_OFFLINE unset)."
        ) from error
    train = parts["train"]
    held_out = parts.get("validation", parts.get("test"))
    if held_out is None:
        held_out = train.select(range(min(data.validation_rows, len(train))))
        train = train.select(range(len(held_out), len(train)))
    held_out = held_out.select(range(min(data.validation_rows, len(held_out))))
    if data.train_rows is not None:
        train = train.select(range(min(data.train_rows, len(train))))
    if len(train) == 0 or len(held_out) == 0:
        raise RecipeError(
            f"The dataset {data.dataset!r} leaves {len(train)} rows to train on and "
            f"{len(held_out)} to validate on. Lower --validation_rows, or choose another."
        )
    return train, held_out
