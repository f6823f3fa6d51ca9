"""The recipe's arguments: a YAML file, overridden by the command line.

In: ``sys.argv``-like strings, e.g. ``configs/minilm_sentiment.yaml --r 16 --optim adamw_torch``.
Out: ``ModelSettings``, ``DataSettings``, the stock ``TrainingArguments`` and ``RateSettings``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared import tweets
from shared.arguments import RecipeError, read
from shared.processes import check_world_size
from shared.rates import RateSettings, pass_rates
from transformers import TrainingArguments

from hf_muon.values import near

HERE = Path(__file__).parent
TASKS = ("classification", "chat")


@dataclass
class ModelSettings:
    """The pretrained model and its adapters."""

    task: str = field(
        default="classification",
        metadata={
            "help": "classification: an encoder with a new head; chat: a causal model answers with "
            "the label."
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

    min_confidence: float = field(
        default=0.7, metadata={"help": "Leave out tweets whose graders agreed less than that."}
    )
    train_rows: int | None = field(
        default=None, metadata={"help": "Use only so many rows; by default all."}
    )
    validation_rows: int = field(default=1000, metadata={"help": "Rows that are held out."})
    max_tokens: int = field(default=48, metadata={"help": "Tweets are cut to so many tokens."})

    def split(self) -> tweets.Split:
        """Return the requested tweets."""
        return tweets.load(
            min_confidence=self.min_confidence,
            train_rows=self.train_rows,
            validation_rows=self.validation_rows,
        )


Parsed = tuple[ModelSettings, DataSettings, TrainingArguments, RateSettings]


def parse(argv: Sequence[str]) -> Parsed:
    """Read ``[config.yaml] [--name value ...]``; the command line overrides the file.

    Raises:
        RecipeError: a name that does not exist, or values that make no sense.
    """
    given = read(argv, (ModelSettings, DataSettings, TrainingArguments, RateSettings), HERE)
    pass_rates(given.values)
    model, data, training, rates = given.made()
    check(model, training)
    if model.loraplus_ratio is not None and rates != RateSettings():
        raise RecipeError(
            f"loraplus_ratio={model.loraplus_ratio:g} makes PEFT's own optimizer, which does not "
            f"take other_learning_rate={rates.other_learning_rate} or "
            f"lr_multipliers={rates.lr_multipliers}: give one or the other. "
            "lr_multipliers=lora_B:16 is a ratio of 16."
        )
    check_world_size(training)
    return model, data, training, rates


def check(model: ModelSettings, training: TrainingArguments) -> None:
    """Raise for values that would train something other than what was meant."""
    if model.task not in TASKS:
        raise RecipeError(
            f"Unknown task {model.task!r}.{near(model.task, TASKS)} Allowed: {', '.join(TASKS)}."
        )
    optim = getattr(training.optim, "value", training.optim)
    if model.loraplus_ratio is not None and not optim.startswith("adamw_torch"):
        raise RecipeError(
            f"loraplus_ratio={model.loraplus_ratio:g} makes PEFT's LoRA+ optimizer, which is AdamW "
            f"here, but optim={optim!r} was asked for. Use --optim adamw_torch, or leave "
            "loraplus_ratio out."
        )
