"""Models and data of the training runs: two small language models, and digits for a small ViT.

In: the number of steps, and sizes where they differ from the defaults. Out: a ``World``: how to
build the model, the data, and how large a batch is. Data are prepared once in a process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import packing
import torch
from pretraining_data import PretrainingData, prepare
from settings import DataSettings
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

VOCABULARY, LENGTH = 1024, 128


@dataclass(frozen=True)
class World:
    """A model and its data.

    Attributes:
        build: makes the untrained model, from the global seed.
        train: rows to train on.
        validation: held-out rows.
        batch: rows per step.
        collate: makes a batch of rows.
        metrics: further measures besides the loss.
        facts: further facts about the data.
    """

    build: Callable[[], nn.Module]
    train: Any
    validation: Any
    batch: int
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] = default_data_collator
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@cache
def text(corpus: str, batch: int, steps: int) -> PretrainingData:
    """Return the corpus of the pretraining recipe in blocks of ``LENGTH`` tokens."""
    data = DataSettings(
        corpus=corpus, vocab_size=VOCABULARY, seq_len=LENGTH, tokens_per_step=batch * LENGTH
    )
    return prepare(data, steps)


def language(
    build: Callable[[], nn.Module], *, steps: int, corpus: str, batch: int, held_out: int
) -> World:
    """Return a language model on a corpus.

    Args:
        build: makes the model.
        steps: number of steps; the corpus must be large enough.
        corpus: a name that the pretraining recipe knows.
        batch: blocks of a step.
        held_out: blocks of validation, spread over the held-out documents.
    """
    data = text(corpus, batch, steps)
    validation = packing.evenly_spread(data.validation, held_out)
    facts = {"corpus": corpus, "tokens": steps * batch * LENGTH}
    return World(build, data.train, validation, batch, packing.collate, facts=facts)


def llama(
    *, steps: int, width: int = 96, layers: int = 3, corpus: str = "shakespeare", batch: int = 16
) -> World:
    """Return a LLaMA."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return language(
        lambda: LlamaForCausalLM(config), steps=steps, corpus=corpus, batch=batch, held_out=256
    )


def gpt2(
    *, steps: int, width: int = 96, layers: int = 3, corpus: str = "shakespeare", batch: int = 16
) -> World:
    """Return a GPT-2: learned positions, layer norms with biases, GELU, tied embeddings."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return language(
        lambda: GPT2LMHeadModel(config), steps=steps, corpus=corpus, batch=batch, held_out=256
    )


def digits(*, steps: int, width: int = 64, layers: int = 4, batch: int = 128) -> World:
    """Return a ViT on scikit-learn's digits: 8 × 8 pixels in patches of 2 × 2."""
    train, validation = digit_rows()
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_labels=10,
    )
    facts = {
        "images": len(train),
        "held_out": len(validation),
        "epochs": steps * batch / len(train),
    }
    return World(
        lambda: ViTForImageClassification(config),
        train,
        validation,
        batch,
        metrics=accuracy,
        facts=facts,
    )


@cache
def digit_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and held-out images (1, 8, 8) in −1 … 1; every fifth one is held out."""
    bunch = load_digits()
    images = torch.tensor(bunch.images[:, None] / 8 - 1, dtype=torch.float32)
    rows = [
        {"pixel_values": image, "labels": int(label)}
        for image, label in zip(images, bunch.target, strict=True)
    ]
    held_out = set(range(0, len(rows), 5))
    return [row for i, row in enumerate(rows) if i not in held_out], rows[::5]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of images whose digit is recognized."""
    told = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": float((told == prediction.label_ids).mean())}


WORLDS: dict[str, Callable[..., World]] = {"llama": llama, "gpt2": gpt2, "digits": digits}
