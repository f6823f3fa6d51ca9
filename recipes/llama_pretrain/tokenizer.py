"""The tokenizer: a byte-level BPE trained on the training documents, or one from the Hub.

In: texts and a vocabulary size. Out: a ``PreTrainedTokenizerFast``. A trained tokenizer is kept in
the user's cache under a hash of everything it depends on, so that it is trained once.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"


def trained_bpe(texts: Sequence[str], vocab_size: int, cache: Path) -> PreTrainedTokenizerFast:
    """Return the byte-level BPE of ``texts``, from the cache when it is there.

    Args:
        texts: training documents only; a held-out text must not shape the vocabulary.
        vocab_size: number of entries, end-of-text included.
        cache: folder for the tokenizer's file.
    """
    path = cache / "tokenizers" / f"bpe{vocab_size}-{content_key(texts, vocab_size)}.json"
    if not path.exists():
        write_whole(path, train(texts, vocab_size).to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_file(str(path)), eos_token=END
    )


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE; every string can be encoded and decoded without loss."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def content_key(texts: Iterable[str], vocab_size: int) -> str:
    """Return a hash of the texts, the vocabulary size and the library's version."""
    digest = hashlib.sha256(f"{tokenizers.__version__} {vocab_size}".encode())
    for text in texts:
        encoded = text.encode("utf8", "surrogatepass")
        digest.update(f"{len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()[:16]


def write_whole(path: Path, content: str) -> None:
    """Write a file so that no other process ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf8") as file:
        file.write(content)
    os.replace(file.name, path)


def from_hub(name: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the Hub (or of a folder), with an end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {name!r} has no end-of-text token to join documents with.")
    return tokenizer
