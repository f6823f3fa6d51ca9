"""Pretrained models and the adapters to train in them.

In: ``ModelSettings``. Out: the model, PEFT's configuration of the adapters, and PEFT's LoRA+
optimizer on request; ``--optim`` selects every other optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from settings import ModelSettings
from shared.assets import opened
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


def tokenizer_of(model: ModelSettings) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer."""
    return opened(AutoTokenizer.from_pretrained, model.model)


def base_model(kind: Any, model: ModelSettings, **options: Any) -> PreTrainedModel:
    """Return the pretrained model; ``kind`` is one of the auto classes."""
    return opened(
        kind.from_pretrained, model.model, attn_implementation=model.attn_implementation, **options
    )


def lora_config(model: ModelSettings, task_type: str, whole: list[str] | None = None) -> LoraConfig:
    """Return the configuration of the adapters.

    Args:
        model: rank, scaling and modules.
        task_type: PEFT's name of the task.
        whole: modules that are new and therefore trained and saved whole.
    """
    names = model.target_modules
    return LoraConfig(
        task_type=task_type,
        r=model.r,
        lora_alpha=2 * model.r if model.lora_alpha is None else model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=names if names == "all-linear" else names.split(","),
        modules_to_save=whole,
    )


def loraplus(
    ratio: float | None, network: PeftModel, args: TrainingArguments
) -> torch.optim.Optimizer | None:
    """Return PEFT's LoRA+ with AdamW, or None if no ratio is given.

    A learns with ``learning_rate`` and B with ``ratio`` times that; a new head's weight gets the
    rate of A, its bias that of B.

    References:
        arXiv 2402.12354.
    """
    if ratio is None:
        return None
    return create_loraplus_optimizer(
        network,
        torch.optim.AdamW,
        lr=args.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def sizes(network: PeftModel) -> dict[str, int]:
    """Return the number of trained parameters, and of all parameters."""
    trained, everything = network.get_nb_trainable_parameters()
    return {"parameters": everything, "trained_parameters": trained}
