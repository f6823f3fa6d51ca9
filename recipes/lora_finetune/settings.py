"""The recipe's arguments: a YAML file, overridden by the command line.

In: ``sys.argv``-like strings, e.g. ``configs/minilm_sentiment.yaml --r 16 --optim adamw_torch``.
Out: ``ModelSettings``, ``DataSettings``, the stock ``TrainingArguments``, in whose place TRL's
``SFTConfig`` is where TRL trains, and ``RateSettings``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from shared.arguments import RecipeError, find_config, load, read, without_rank
from shared.processes import check_world_size
from shared.rates import RateSettings, set_other_rate
from transformers import TrainingArguments

from hf_muon.values import near

HERE = Path(__file__).parent
TASKS = ("classification", "chat", "sft")


@dataclass
class ModelSettings:
    """The pretrained model and its adapters."""

    task: str = field(
        default="classification",
        metadata={
            "help": "classification: an encoder with a new head; chat: a causal model answers with "
            "the label; sft: a causal model and TRL's SFTTrainer."
        },
    )
    model: str = field(
        default="minilm",
        metadata={"help": "minilm, smollm2, a folder, or the name of a Hub model (owner/name)."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager ...; eager is faster for short rows on a CPU in bfloat16."},
    )
    r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapters' scaling is lora_alpha/r; by default 2."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    target_modules: str = field(
        default="all-linear",
        metadata={"help": "all-linear, or names of modules separated by commas."},
    )
    loraplus_ratio: float | None = field(
        default=None,
        metadata={"help": "LoRA+ with AdamW: how many times learning_rate the factor B gets."},
    )


@dataclass
class DataSettings:
    """Rows to train and validate on."""

    dataset: str = field(
        default="tweets",
        metadata={"help": "tweets; for sft a folder or the name of a Hub dataset (owner/name)."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    min_confidence: float = field(
        default=0.7, metadata={"help": "Leave out tweets whose graders agreed less than that."}
    )
    train_rows: int | None = field(
        default=None, metadata={"help": "Use only so many rows; by default all."}
    )
    validation_rows: int = field(default=1000, metadata={"help": "Rows that are held out."})
    max_tokens: int = field(
        default=48, metadata={"help": "Tweets are cut to so many tokens (sft: see --max_length)."}
    )


Parsed = tuple[ModelSettings, DataSettings, TrainingArguments, RateSettings]


def parse(argv: Sequence[str]) -> Parsed:
    """Read ``[config.yaml] [--name value ...]``; the command line overrides the file.

    Raises:
        RecipeError: a name that does not exist, or values that make no sense.
    """
    argv = without_rank(argv)
    kinds = (ModelSettings, DataSettings, training_kind(argv), RateSettings)
    given = read(argv, kinds, HERE)
    set_other_rate(given.values)
    model, data, training, rates = given.made()
    check(model, data, training)
    if model.loraplus_ratio is not None and rates.other_learning_rate is not None:
        raise RecipeError("loraplus_ratio and other_learning_rate do not go together: give one.")
    check_world_size(training)
    return model, data, training, rates


def training_kind(argv: Sequence[str]) -> type[TrainingArguments]:
    """Return the class of the training arguments, which follows from the task."""
    if chosen_task(argv) != "sft":
        return TrainingArguments
    if find_spec("trl") is None:
        raise RecipeError("The task 'sft' needs TRL. Install it with `pip install trl`.")
    from trl import SFTConfig

    return SFTConfig


def chosen_task(argv: Sequence[str]) -> str:
    """Return the task of the command line, or that of the file, before the rest is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    task = parser.parse_known_args(list(argv))[0].task
    if task is None and argv and not argv[0].startswith("-"):
        task = load(find_config(argv[0], HERE)).get("task")
    return task or ModelSettings.task


def check(model: ModelSettings, data: DataSettings, training: TrainingArguments) -> None:
    """Refuse values that would train something else than was meant."""
    if model.task not in TASKS:
        raise RecipeError(
            f"Unknown task {model.task!r}.{near(model.task, TASKS)} Allowed: {', '.join(TASKS)}."
        )
    if model.task != "sft" and data.dataset != "tweets":
        raise RecipeError(
            f"dataset={data.dataset!r} is for the task sft; {model.task} knows 'tweets' only."
        )
    optim = getattr(training.optim, "value", training.optim)
    if model.loraplus_ratio is not None and not optim.startswith("adamw_torch"):
        raise RecipeError(
            f"loraplus_ratio={model.loraplus_ratio:g} makes PEFT's LoRA+ optimizer, which is AdamW "
            f"here, but optim={optim!r} was asked for. Use --optim adamw_torch, or leave "
            "loraplus_ratio out."
        )
