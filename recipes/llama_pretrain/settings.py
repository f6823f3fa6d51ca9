"""The recipe's arguments: a YAML file, overridden by the command line.

In: ``sys.argv``-like strings, e.g. ``configs/tiny.yaml --optim muon --learning_rate 0.02``.
Out: ``ModelSettings``, ``DataSettings`` and the stock ``TrainingArguments``, in which the number of
steps and of accumulation steps follow from the tokens asked for and the number of processes.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import get_cpu_distributed_information, parse_flag_from_env
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

HERE = Path(__file__).parent


class RecipeError(ValueError):
    """A mistake the user can mend; ``run.py`` prints it without a traceback."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


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
        metadata={"help": "shakespeare, sotu, stdlib, or the Hub name of a dataset (owner/name)."},
    )
    corpus_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset, e.g. `en` of allenai/c4."}
    )
    text_column: str = field(default="text", metadata={"help": "Text column of a Hub dataset."})
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
    expected_world_size: int | None = field(
        default=None, metadata={"help": "Stop unless exactly this many processes take part."}
    )


SETTINGS = (ModelSettings, DataSettings, TrainingArguments)


def parse(argv: Sequence[str]) -> tuple[ModelSettings, DataSettings, TrainingArguments]:
    """Read ``[config.yaml] [--name value ...]``; the command line overrides the file.

    Args:
        argv: arguments without the program's name.

    Returns:
        The three argument objects, with consistent step counts.

    Raises:
        RecipeError: a name that does not exist, or token counts that do not fit together.
    """
    parser = HfArgumentParser(SETTINGS)
    # Every parameter of a LLaMA gets a gradient; DDP need not look for others in each step.
    parser.set_defaults(ddp_find_unused_parameters=False)
    rest = list(argv)
    stem = "custom"
    if rest and not rest[0].startswith("-"):
        path = find_config(rest.pop(0))
        parser.set_defaults(**read_config(path))
        stem = path.stem
    values = vars(parser.parse_args(rest))
    if values["output_dir"] is None:
        values["output_dir"] = f"runs/llama_pretrain/{stem}_{values['optim']}"
    set_step_counts(values)
    model, data, training = parser.parse_dict(values)
    check_world_size(data, training)
    return model, data, training


def find_config(name: str) -> Path:
    """Return the YAML file of that path, looked for here and in the recipe's folder."""
    for path in (Path(name), HERE / name):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in (HERE / "configs").glob("*.yaml")))
    raise RecipeError(f"No configuration file {name!r}. The recipe has configs/ of: {shipped}.")


def read_config(path: Path) -> dict[str, Any]:
    """Return the values of a YAML file, after a check of every name."""
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf8")) or {}
    allowed = {item.name for settings in SETTINGS for item in fields(settings)}
    for name in values:
        if name not in allowed:
            raise RecipeError(
                f"{path} sets {name!r}, which no argument has.{nearest(name, allowed)}"
            )
    return values


def set_step_counts(values: dict[str, Any]) -> None:
    """Fill in ``gradient_accumulation_steps`` and ``max_steps`` from the token counts.

    This happens before ``TrainingArguments`` exists, because it hands both numbers on to a
    DeepSpeed configuration while it is constructed.
    """
    processes = launched_processes()
    per_pass = values["seq_len"] * values["per_device_train_batch_size"] * processes
    per_step = values["tokens_per_step"]
    if per_step % per_pass:
        raise RecipeError(
            f"tokens_per_step={per_step} is not a multiple of seq_len × per_device_train_batch_size"
            f" × processes = {values['seq_len']} × {values['per_device_train_batch_size']} ×"
            f" {processes} = {per_pass}. Change one of them, e.g. --tokens_per_step"
            f" {max(1, round(per_step / per_pass)) * per_pass}."
        )
    values["gradient_accumulation_steps"] = per_step // per_pass
    if values["max_steps"] <= 0:
        values["max_steps"] = values["token_budget"] // per_step
        if values["max_steps"] == 0:
            raise RecipeError(
                f"token_budget={values['token_budget']} is less than one step of {per_step} tokens."
            )


def launched_processes() -> int:
    """Return the number of processes that torchrun, accelerate, DeepSpeed or MPI announced."""
    return get_cpu_distributed_information().world_size


def check_world_size(data: DataSettings, training: TrainingArguments) -> None:
    """Stop if the processes do not train together as asked.

    Some launch forms start one process, or several that do not know of each other, and say nothing
    about it; on a CPU most of them do.
    """
    expected = data.expected_world_size or launched_processes()
    if training.world_size != expected:
        raise RecipeError(
            f"{expected} processes were asked for, but {training.world_size} train together. "
            f"Launch with `torchrun --nproc_per_node {expected} run.py ...`, or with `accelerate "
            f"launch --num_processes {expected}` and a configuration of recipes/accelerate; on a "
            "CPU the processes find each other with --use_cpu true only."
        )
    if data.expected_world_size is None and was_left_alone():
        raise RecipeError(
            "`accelerate launch` was asked for several processes and has started one: under --cpu, "
            "MULTI_CPU and 'NO' it starts no others. Launch with `accelerate launch --config_file "
            "recipes/accelerate/ddp.yaml --num_processes N`, on a CPU too; or train in one process "
            "with --expected_world_size 1."
        )
    if training.n_gpu > 1:
        raise RecipeError(
            f"One process sees {training.n_gpu} GPUs, and the Trainer would give each of them a "
            "batch: a step would have more than tokens_per_step tokens. Launch with `torchrun "
            f"--nproc_per_node {training.n_gpu} run.py ...`, or set CUDA_VISIBLE_DEVICES=0."
        )


def was_left_alone() -> bool:
    """Return whether accelerate's launcher prepared for several processes and started this one.

    It then names the port of a rendezvous to which nobody comes (seen in accelerate 1.15).
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ
    return launched and "MASTER_PORT" in os.environ and launched_processes() == 1


def check_sharding(trainer: Trainer) -> None:
    """Stop if accelerate trains with plain DDP where FSDP or DeepSpeed was launched."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not trainer.is_fsdp_enabled:
        raise RecipeError(
            "FSDP was launched, but accelerate has it on accelerators only and would train with "
            f"DDP on this device, {trainer.args.device.type}. Set --use_cpu false where there is "
            "a GPU; on a CPU use recipes/accelerate/ddp.yaml, or zero1 to zero3, which shard."
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not trainer.is_deepspeed_enabled:
        raise RecipeError(
            "DeepSpeed was launched, but accelerate ignores it under ACCELERATE_USE_CPU=true and "
            "would train with DDP. Unset the variable; --use_cpu true is enough on a CPU."
        )


def checkpoint(training: TrainingArguments) -> str | None:
    """Return the checkpoint to go on from; ``last`` is the newest one of the output folder."""
    asked = training.resume_from_checkpoint
    if asked != "last":
        return asked
    folder = Path(training.output_dir)
    found = get_last_checkpoint(training.output_dir) if folder.is_dir() else None
    if found is None:
        raise RecipeError(f"There is no checkpoint in {folder} to go on from.")
    return found
