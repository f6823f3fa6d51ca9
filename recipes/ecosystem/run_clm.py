"""Train a causal language model on a text file, in the usual form of such a script.

In: ``run_clm.py --model_name_or_path … --train_file … [--do_train] [--do_eval] …``: two dataclasses
and the stock ``TrainingArguments``. Out: in ``--output_dir``, the model and its metrics. The script
contains nothing about any particular optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain

from datasets import DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    """The model to train, and its starting point."""

    model_name_or_path: str = field(
        metadata={"help": "A folder or the name of a Hub model; its tokenizer is used."}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Take the configuration only; weights are random."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "With --from_scratch: name=value, separated by commas."}
    )


@dataclass
class DataTrainingArguments:
    """The text to train on."""

    train_file: str = field(metadata={"help": "A text file."})
    validation_file: str | None = field(
        default=None, metadata={"help": "A text file; by default a part of the train file."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "That part, where no validation file is given."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens in a row."})


def main() -> None:
    """Train, evaluate and save, as the arguments say."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = build_model(model_args)
    with training_args.main_process_first(desc="tokenizing and grouping"):
        blocks = group_texts(load_texts(data_args), tokenizer, data_args.block_size)
    for name, rows in blocks.items():
        if len(rows) == 0:
            raise SystemExit(f"The {name} text is shorter than a block of {data_args.block_size}.")

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"] if training_args.do_train else None,
        eval_dataset=blocks["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def build_model(args: ModelArguments) -> AutoModelForCausalLM:
    """Return the pretrained model, or the same architecture with random weights."""
    if not args.from_scratch:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    return AutoModelForCausalLM.from_config(config)


def load_texts(args: DataTrainingArguments) -> DatasetDict:
    """Return the lines of the files, as ``train`` and ``validation``."""
    if args.validation_file is not None:
        files = {"train": args.train_file, "validation": args.validation_file}
        return load_dataset("text", data_files=files)
    share, files = args.validation_split_percentage, {"train": args.train_file}
    parts = {"validation": f"train[:{share}%]", "train": f"train[{share}%:]"}
    return DatasetDict(
        {name: load_dataset("text", data_files=files, split=split) for name, split in parts.items()}
    )


def group_texts(texts: DatasetDict, tokenizer: AutoTokenizer, block_size: int) -> DatasetDict:
    """Return the texts as rows of ``block_size`` tokens; the rest of each batch is dropped."""

    def tokenize(lines: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return tokenizer([f"{line}\n" for line in lines["text"]])

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(chain.from_iterable(rows["input_ids"]))
        end = len(joined) - len(joined) % block_size
        blocks = [joined[start : start + block_size] for start in range(0, end, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    tokens = texts.map(tokenize, batched=True, remove_columns=["text"])
    return tokens.map(group, batched=True, remove_columns=tokens["train"].column_names)


if __name__ == "__main__":
    main()
