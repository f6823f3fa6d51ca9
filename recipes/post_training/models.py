"""Models to start from: a small random one or a pretrained one, with adapters on request.

In: a name, a rank, PEFT's name of the task, and rows. Out: model, tokenizer, and the adapter
configuration that TRL applies to the model. Samples: the model's output for some prompts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import datasets
import torch
from peft import LoraConfig
from shared.assets import opened
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
)

END = "<|endoftext|>"
KINDS = {
    "CAUSAL_LM": (AutoModelForCausalLM, {}),
    "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 1}),
}


class Opened(NamedTuple):
    """A model to train."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: LoraConfig | None


def open_model(name: str, r: int | None, task: str, rows: datasets.Dataset) -> Opened:
    """Return the model of that name; ``tiny`` is a random LLaMA with a tokenizer of the rows."""
    kind, options = KINDS[task]
    if name == "tiny":
        tokenizer = trained_tokenizer(rows)
        model = kind.from_config(tiny_llama(tokenizer, **options))
    else:
        tokenizer = opened(AutoTokenizer.from_pretrained, name)
        model = opened(kind.from_pretrained, name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    adapter = None
    if r is not None:
        head = ["score"] if task == "SEQ_CLS" else None  # a new module is trained and saved whole
        adapter = LoraConfig(
            task_type=task, r=r, lora_alpha=2 * r, target_modules="all-linear", modules_to_save=head
        )
    return Opened(model, tokenizer, adapter)


def trained_tokenizer(rows: datasets.Dataset) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of the rows' texts; it does not depend on their order."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [text for column in rows.column_names for text in dict.fromkeys(rows[column])]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=[END], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def tiny_llama(tokenizer: PreTrainedTokenizerBase, **options: int) -> LlamaConfig:
    """Return the configuration of a LLaMA of 0.4 M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )


@torch.no_grad()
def written(trainer: Trainer, rows: datasets.Dataset, tokens: int = 24) -> list[str]:
    """Return the model's output for the first three different prompts of some rows.

    A prompt is a text, or a conversation that the model's template turns into one.
    """
    tokenizer = trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model).eval()

    def text_of(row: dict[str, Any]) -> str:
        prompt = row.get("prompt") or row.get("messages", [{"content": ""}])[:1]
        if isinstance(prompt, str):
            return prompt
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)

    lines = []
    for prompt in list(dict.fromkeys(map(text_of, rows)))[:3]:
        given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        told = model.generate(**given, max_new_tokens=tokens, do_sample=False)
        answer = tokenizer.decode(told[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        lines.append(f"{prompt!r} → {answer!r}")
    return lines
