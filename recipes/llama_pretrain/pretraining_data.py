"""From the data settings to blocks a model can train on.

In: ``DataSettings`` and the number of steps. Out: the tokenizer, the training and validation
blocks, and a description of them for ``results.json``. Sizes that make no sense are refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import corpora
import datasets
import packing
import tokenizer as tokenization
from settings import DataSettings
from shared.arguments import RecipeError
from shared.assets import cache_folder
from stream import BlockStream
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PretrainingData:
    """Blocks of tokens for training and validation; ``train`` may be a stream."""

    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset | BlockStream
    validation: datasets.Dataset
    description: dict[str, Any]


def prepare(data: DataSettings, steps: int) -> PretrainingData:
    """Load the corpus, get its tokenizer, and pack both halves into blocks.

    Args:
        data: corpus, tokenizer and sizes.
        steps: optimizer steps that will be taken.

    Raises:
        RecipeError: the corpus is missing or too small.
    """
    split = corpora.load(data)
    held_out = [document.text for document in split.validation]
    if isinstance(split.train, datasets.IterableDataset):
        tokenizer = choose_tokenizer(data, split.train.take(data.tokenizer_documents))
        train = BlockStream(split.train, data.text_column, tokenizer, data.seq_len)
        validation = packing.packed(held_out, tokenizer, data.seq_len)
        facts = {"train_documents": "streamed", "validation_documents": len(held_out)}
    else:
        texts = [document.text for document in split.train]
        tokenizer = choose_tokenizer(data, [{data.text_column: text} for text in texts])
        train = whole_steps(packing.packed(texts, tokenizer, data.seq_len), data)
        validation = packing.packed(held_out, tokenizer, data.seq_len)
        facts = local_facts(data, split, train, validation, len(tokenizer), steps)
    sizes = {
        "vocab_size": len(tokenizer),
        "validation_tokens": len(validation) * data.seq_len,
        "tokens_asked": steps * data.tokens_per_step,
    }
    return PretrainingData(tokenizer, train, validation, vars(data) | sizes | facts)


def choose_tokenizer(data: DataSettings, rows: Any) -> PreTrainedTokenizerBase:
    """Return the Hub tokenizer that is asked for, or a BPE of the training rows."""
    if data.tokenizer is not None:
        return tokenization.from_hub(data.tokenizer)
    texts = [row[data.text_column] for row in rows]
    return tokenization.trained_bpe(texts, data.vocab_size, cache_folder())


def whole_steps(train: datasets.Dataset, data: DataSettings) -> datasets.Dataset:
    """Drop the blocks that do not fill a step; the last step of an epoch would be smaller."""
    per_step = data.tokens_per_step // data.seq_len
    return train.select(range(len(train) - len(train) % per_step))


def local_facts(
    data: DataSettings,
    split: corpora.Split,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    vocab_size: int,
    steps: int,
) -> dict[str, Any]:
    """Return facts about a corpus that fits in memory, after checking its size."""
    available = len(train) * data.seq_len
    epochs = passes(data, steps * data.tokens_per_step, available, len(validation))
    return {
        "train_documents": len(split.train),
        "validation_documents": names(split.validation),
        "train_tokens_available": available,
        "epochs": round(epochs, 3),
        "unigram_loss": round(packing.unigram_loss(train, validation, vocab_size), 4),
    }


def names(documents: Sequence[corpora.Document], most: int = 20) -> list[str] | int:
    """Return the documents' names, or their number when they are many."""
    return [document.name for document in documents] if len(documents) <= most else len(documents)


def passes(data: DataSettings, asked: int, available: int, validation_blocks: int) -> float:
    """Return how often the budget passes over the corpus; raise if the sizes make no sense."""
    if available == 0 or validation_blocks == 0:
        raise RecipeError(
            f"The corpus {data.corpus!r} is too small: it does not fill one step of "
            f"{data.tokens_per_step} tokens and one validation block of {data.seq_len}."
        )
    epochs = asked / available
    if epochs > data.max_epochs:
        raise RecipeError(
            f"The corpus {data.corpus!r} has {available:,} training tokens, and {asked:,} would "
            f"pass over it {epochs:.1f} times. Lower --token_budget (or --max_steps), or allow it "
            f"with --max_epochs {epochs + 0.1:.1f}."
        )
    return epochs
