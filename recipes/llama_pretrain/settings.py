"""The recipe's arguments: a YAML file, overridden by the command line.

In: ``sys.argv``-like strings, e.g. ``configs/tiny.yaml --optim muon --learning_rate 0.02``.
Out: ``ModelSettings``, ``DataSettings``, ``RateSettings`` and the stock ``TrainingArguments``, in
which the numbers of steps and of accumulation steps follow from the requested tokens and the number
of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.arguments import RecipeError, read
from shared.processes import check_world_size, launched_processes
from shared.rates import RateSettings, pass_rates
from transformers import TrainingArguments

HERE = Path(__file__).parent


@dataclass
class ModelSettings:
    """Shape of the LLaMA that is trained from scratch."""

    hidden_size: int = field(default=128, metadata={"help": "Width of the residual stream."})
    intermediate_size: int = field(default=344, metadata={"help": "Width inside the MLP."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Number of decoder layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    tie_word_embeddings: bool = field(
        default=False, metadata={"help": "Share the embedding matrix with the output head."}
    )


@dataclass
class DataSettings:
    """Corpus, tokenizer, and the number of tokens."""

    corpus: str = field(
        default="shakespeare",
        metadata={
            "help": "shakespeare, sotu, stdlib; file:PATH of a .txt, .jsonl or .parquet file, of a "
            "folder of them, or of a .yaml mixture; several joined by +; or the Hub name of a "
            "dataset (owner/name)."
        },
    )
    corpus_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, e.g. `en` of allenai/c4."}
    )
    text_column: str = field(
        default="text",
        metadata={"help": "Text column of a Hub dataset, of .jsonl and of .parquet files."},
    )
    streaming: bool = field(
        default=True, metadata={"help": "Stream a Hub dataset instead of downloading it."}
    )
    max_documents: int | None = field(
        default=None, metadata={"help": "Use only the first documents of a local corpus."}
    )
    holdout_every: int = field(
        default=10, metadata={"help": "Every k-th document, sorted by name, is held out."}
    )
    holdout_documents: int = field(
        default=1000,
        metadata={"help": "Held-out documents of a streamed dataset (of its validation split)."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Tokenizer from the Hub; by default a BPE is trained on the corpus."},
    )
    vocab_size: int = field(default=2048, metadata={"help": "Entries of the trained BPE."})
    tokenizer_documents: int = field(
        default=50_000, metadata={"help": "Documents of a stream that the BPE is trained on."}
    )
    seq_len: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    tokens_per_step: int = field(
        default=8192, metadata={"help": "Tokens in an optimizer step, over all processes."}
    )
    token_budget: int = field(
        default=1_000_000,
        metadata={"help": "Tokens to train on; --max_steps overrides it when it is above 0."},
    )
    max_epochs: float = field(
        default=4.0, metadata={"help": "Refuse a budget that repeats the corpus more often."}
    )
    eval_blocks: int = field(
        default=64,
        metadata={"help": "Validation sequences, evenly spread, that the curve is measured on."},
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "What one device can compute, in TFLOP/s, for the utilisation that is logged; "
            "known for A100, H100 and H200."
        },
    )
    expected_world_size: int | None = field(
        default=None, metadata={"help": "Stop unless exactly this many processes take part."}
    )


SETTINGS = (ModelSettings, DataSettings, TrainingArguments, RateSettings)
Parsed = tuple[ModelSettings, DataSettings, TrainingArguments, RateSettings]


def parse(argv: Sequence[str]) -> Parsed:
    """Read ``[config.yaml] [--name value ...]``; the command line overrides the file.

    Args:
        argv: arguments without the program's name.

    Returns:
        The four argument objects, with consistent step counts.

    Raises:
        RecipeError: a name that does not exist, or token counts that do not fit together.
    """
    # Every parameter of a LLaMA gets a gradient, so DDP need not search for unused ones.
    given = read(argv, SETTINGS, HERE, ddp_find_unused_parameters=False)
    set_step_counts(given.values)
    pass_rates(given.values)
    model, data, training, rates = given.made()
    check_world_size(training, data.expected_world_size)
    return model, data, training, rates


def set_step_counts(values: dict[str, Any]) -> None:
    """Fill in ``gradient_accumulation_steps`` and ``max_steps`` from the token counts.

    This must happen before ``TrainingArguments`` is constructed, because its constructor passes
    both numbers on to a DeepSpeed configuration.
    """
    processes = launched_processes()
    per_pass = values["seq_len"] * values["per_device_train_batch_size"] * processes
    per_step = values["tokens_per_step"]
    if per_step % per_pass:
        raise RecipeError(
            f"tokens_per_step={per_step} is not a multiple of seq_len × per_device_train_batch_size"
            f" × processes = {values['seq_len']} × {values['per_device_train_batch_size']} ×"
            f" {processes} = {per_pass}. Change one of them, e.g. {fitting(values, processes)}."
        )
    values["gradient_accumulation_steps"] = per_step // per_pass
    if values["max_steps"] <= 0:
        values["max_steps"] = values["token_budget"] // per_step
        if values["max_steps"] == 0:
            raise RecipeError(
                f"token_budget={values['token_budget']} is less than one step of {per_step} tokens."
            )


def fitting(values: dict[str, Any], processes: int) -> str:
    """Return an option with which the tokens of a step divide evenly.

    If possible it is a smaller batch, which does not change the training.
    """
    batch, seq_len = values["per_device_train_batch_size"], values["seq_len"]
    sequences, rest = divmod(values["tokens_per_step"], seq_len * processes)
    if rest or not sequences:
        per_pass = seq_len * batch * processes
        passes = max(1, round(values["tokens_per_step"] / per_pass))
        return f"--tokens_per_step {passes * per_pass}"
    smaller = max(size for size in range(1, batch + 1) if sequences % size == 0)
    return f"--per_device_train_batch_size {smaller}"
