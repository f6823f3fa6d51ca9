"""Packing: documents become blocks of equal length without padding.

In: documents and a tokenizer. Out: a dataset of ``input_ids`` rows of ``seq_len`` tokens. Documents
are joined by the end-of-text token and cut; only the last incomplete block of the whole corpus is
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def pack(documents: Iterable[Sequence[int]], seq_len: int, end: int) -> Iterator[list[int]]:
    """Yield blocks of ``seq_len`` tokens from documents that each get the token ``end``."""
    buffer: list[int] = []
    for document in documents:
        buffer.extend(document)
        buffer.append(end)
        whole = len(buffer) - len(buffer) % seq_len
        for start in range(0, whole, seq_len):
            yield buffer[start : start + seq_len]
        del buffer[:whole]


def packed(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> datasets.Dataset:
    """Return all blocks of texts that fit in memory."""
    rows = pack(encode(texts, tokenizer), seq_len, tokenizer.eos_token_id)
    return datasets.Dataset.from_dict({"input_ids": list(rows)}).with_format("torch")


def encode(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, at_once: int = 256
) -> Iterator[list[int]]:
    """Yield the tokens of each text; the tokenizer works on several in parallel."""
    texts = iter(texts)
    for first in texts:
        batch = [first, *islice(texts, at_once - 1)]
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack blocks into a batch; the model shifts the labels itself."""
    input_ids = torch.stack([row["input_ids"] for row in rows])  # (batch, seq_len)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def evenly_spread(blocks: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return ``count`` blocks spread over the whole dataset, or all when there are fewer."""
    if count >= len(blocks):
        return blocks
    return blocks.select(np.linspace(0, len(blocks) - 1, count).round().astype(int))


def unigram_loss(train: datasets.Dataset, validation: datasets.Dataset, vocab_size: int) -> float:
    """Return the validation loss, in nats per token, of predicting by token frequency alone."""
    counts = np.bincount(flat(train), minlength=vocab_size) + 1  # add-one: no token is impossible
    surprise = -np.log(counts / counts.sum())
    return float(surprise[flat(validation)].mean())


def flat(blocks: datasets.Dataset) -> np.ndarray:
    """Return the tokens of all blocks in a row."""
    return np.asarray(blocks.with_format("numpy")[:]["input_ids"]).ravel()
