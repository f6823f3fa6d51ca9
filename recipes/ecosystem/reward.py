"""Train a reward model with TRL's ``RewardTrainer`` and Muon, on pairs of graded tweets.

In: ``python reward.py [--model smollm2] [--optim muon] [--learning_rate 0.003] ...``: ``Settings``
and TRL's ``RewardConfig``. Out: the share of held-out pairs that are ranked right, before and
after, and in ``--output_dir`` the model (or its adapter), ``pairs.json`` and ``muon_report.json``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared
sys.path.append(str(Path(__file__).parents[1] / "lora_finetune"))  # for the tweets

import datasets
import tokenizers
import tweets
from peft import LoraConfig
from settings import DataSettings
from shared.arguments import RecipeError
from shared.assets import cached_folder
from shared.progress import quiet_libraries, use_quiet_progress
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

PROMPT = "Write a tweet in a good mood.\n"
END = "<|endoftext|>"
DEFAULTS = {
    "output_dir": "runs/ecosystem/reward",
    "optim": "muon",
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_steps": 200,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 50,  # divides the held-out pairs: TRL averages over batches
    "lr_scheduler_type": "linear",
    "max_length": 128,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "bf16": False,
}


@dataclass
class Settings:
    """The model, and how many pairs there are."""

    model: str = field(
        default="tiny",
        metadata={"help": "tiny: a random LLaMA; smollm2: LoRA adapters in SmolLM2-135M-Instruct."},
    )
    train_pairs: int = field(default=1800, metadata={"help": "Pairs to train on."})
    validation_pairs: int = field(default=400, metadata={"help": "Pairs that are held out."})


def main(argv: list[str]) -> dict[str, object]:
    """Train, count the pairs that are ranked right before and after, and return the counts."""
    parser = HfArgumentParser((Settings, RewardConfig))
    parser.set_defaults(**DEFAULTS)
    settings, args = parser.parse_args_into_dataclasses(argv)
    quiet_libraries()
    set_seed(args.seed)  # the new head, the tiny model and the adapters are random
    train, held_out = pairs(settings)
    model, tokenizer, adapter = build(settings.model, train)
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    use_quiet_progress(trainer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    results = {
        "model": settings.model,
        "optimizer": str(args.optim.value),
        "train_pairs": len(trainer.train_dataset),
        "validation_pairs": len(trainer.eval_dataset),
        "accuracy_before": before["eval_accuracy"],
        "accuracy_after": after["eval_accuracy"],
        "loss_before": before["eval_loss"],
        "loss_after": after["eval_loss"],
    }
    if trainer.is_world_process_zero():
        path = Path(args.output_dir) / "pairs.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf8")
        print(
            f"{len(trainer.eval_dataset)} held-out pairs: {before['eval_accuracy']:.1%} ranked "
            f"right before, {after['eval_accuracy']:.1%} after; {path}"
        )
    return results


def pairs(settings: Settings) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return pairs to train on and pairs held out, made of different tweets.

    Raises:
        RecipeError: There are fewer positive or negative tweets than pairs were asked for.
    """
    rows = tweets.load(DataSettings(validation_rows=4000))
    return (
        preferences(rows.train, settings.train_pairs),
        preferences(rows.validation, settings.validation_pairs),
    )


def preferences(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return ``count`` rows ``prompt, chosen, rejected``: a positive tweet over a negative one."""
    positive, negative = (
        [row["text"] for row in rows if tweets.LABELS[row["label"]] == name]
        for name in ("positive", "negative")
    )
    most = min(len(positive), len(negative))
    if not 0 < count <= most:
        raise RecipeError(f"{count} pairs were asked for; allowed are 1 to {most} of them.")
    return datasets.Dataset.from_dict(
        {"prompt": [PROMPT] * count, "chosen": positive[:count], "rejected": negative[:count]}
    )


def build(
    name: str, train: datasets.Dataset
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LoraConfig | None]:
    """Return a model with one output, its tokenizer, and the adapter TRL shall put into it."""
    if name == "tiny":
        tokenizer = trained_tokenizer([*train["prompt"][:1], *train["chosen"], *train["rejected"]])
        return tiny_llama(tokenizer), tokenizer, None
    if name == "smollm2":
        folder = cached_folder("smollm2")
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        adapter = LoraConfig(
            task_type="SEQ_CLS",
            r=8,
            lora_alpha=16,
            target_modules="all-linear",
            modules_to_save=["score"],  # the head is new
        )
        return model, AutoTokenizer.from_pretrained(folder), adapter
    raise RecipeError(f"Unknown model {name!r}. Allowed: tiny, smollm2.")


def trained_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of the texts; their order decides nothing."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2000, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def tiny_llama(tokenizer: PreTrainedTokenizerBase) -> LlamaForSequenceClassification:
    """Return a LLaMA of 0.4 M parameters with random weights and one output."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForSequenceClassification(config)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RecipeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
