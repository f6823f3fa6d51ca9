"""Train an encoder-decoder with the stock ``Seq2SeqTrainer`` and Muon: words in reverse order.

In: ``python run.py configs/t5.yaml [--model bart] [--dataset owner/name] ...``. Out: in
``--output_dir`` the model, ``results.json`` with the share of held-out rows that it generates
exactly, before and after, and ``muon_report.json``; on the screen both shares and three samples.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import datasets
import numpy as np
from shared import compared, hub
from shared.arguments import read
from shared.assets import opened
from shared.processes import check_world_size
from shared.progress import quiet_libraries
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    set_seed,
)

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

HERE = Path(__file__).parent
WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "hen", "owl", "pig", "ram", "sow", "yak"]
SPECIAL = ["<pad>", "</s>", "<unk>"]
SMALL = {
    "t5": partial(T5Config, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    "bart": partial(
        BartConfig,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=64,
        bos_token_id=0,
        forced_eos_token_id=None,
    ),
}  # 0.1 M parameters each


PACKAGED = 8000


@dataclass
class Settings(hub.Rows):
    """The model and its rows: a dataset has columns source and target."""

    model: str = field(
        default="t5",
        metadata={"help": "t5 or bart (small and random), a folder, or a Hub model (owner/name)."},
    )
    max_tokens: int = field(default=64, metadata={"help": "Texts are cut to so many tokens."})


def main(argv: list[str]) -> dict[str, Any] | None:
    """Train, and return the results; see :func:`shared.compared.train`."""
    settings, args = read(argv, (Settings, Seq2SeqTrainingArguments), HERE).made()
    check_world_size(args)
    quiet_libraries()
    set_seed(args.seed)  # a small model is random
    train, held_out = settings.parts(reversed_words, PACKAGED)
    model, tokenizer = open_model(settings.model)

    def tokens(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        limit = {"truncation": True, "max_length": settings.max_tokens}
        return tokenizer(rows["source"], text_target=rows["target"], **limit)

    def decoded(ids: np.ndarray) -> list[str]:
        ids = np.where(ids < 0, tokenizer.pad_token_id, ids)  # labels are padded with -100
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def exact(prediction: EvalPrediction) -> dict[str, float]:
        told, asked = decoded(prediction.predictions), decoded(prediction.label_ids)
        return {"exact": float(np.mean([a == b for a, b in zip(told, asked, strict=True)]))}

    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=train.map(tokens, batched=True, remove_columns=train.column_names),
        eval_dataset=held_out.map(tokens, batched=True, remove_columns=held_out.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=exact,
    )

    def measured() -> dict[str, float]:
        found = trainer.evaluate()
        return {name: found[f"eval_{name}"] for name in ("loss", "exact")}

    def samples() -> list[str]:
        told = decoded(trainer.predict(trainer.eval_dataset.select(range(3))).predictions)[:3]
        return [f"{a!r} → {b!r}" for a, b in zip(held_out["source"][:3], told, strict=True)]

    facts = {"train_rows": len(train), "validation_rows": len(held_out)}
    return compared.train(trainer, measured, samples, settings=vars(settings), **facts)


def reversed_words(train: int, held_out: int) -> hub.Parts:
    """Return rows of three to six words and the same words in reverse; no row appears twice."""
    draw = random.Random(0)
    texts: dict[str, None] = {}
    while len(texts) < train + held_out:
        texts[" ".join(draw.choices(WORDS, k=draw.randint(3, 6)))] = None
    target = [" ".join(reversed(text.split())) for text in texts]
    rows = datasets.Dataset.from_dict({"source": list(texts), "target": target})
    return rows.skip(held_out), rows.take(held_out)


def open_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a pretrained model, or a small random one over words."""
    if name not in SMALL:
        model = opened(AutoModelForSeq2SeqLM.from_pretrained, name)
        return model, opened(AutoTokenizer.from_pretrained, name)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = SMALL[name](
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    return AutoModelForSeq2SeqLM.from_config(config), tokenizer


if __name__ == "__main__":
    compared.ended(main)
