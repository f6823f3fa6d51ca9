"""Characters: a text becomes numbers, and windows of them.

In: a corpus. Out: training and validation characters (of a single file the first 90 % and the last
10 %, as in nanoGPT), and windows to train and to evaluate on.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

sys.path.append(str(Path(__file__).parents[1] / "llama_pretrain"))  # for its corpora

import corpora
from settings import DataSettings


@dataclass(frozen=True)
class Text:
    """A text as a sequence of character numbers.

    Attributes:
        name: includes a hash of the content, so that runs on another text are told apart.
        characters: all characters in the text, sorted.
        train: to train on.
        validation: held out.
    """

    name: str
    characters: str
    train: np.ndarray
    validation: np.ndarray


def load(corpus: str, most: int | None = None) -> Text:
    """Return a corpus.

    Args:
        corpus: as the pretraining recipe names it.
        most: characters of each half, for quick runs.
    """
    split = corpora.load(DataSettings(corpus=corpus, holdout_every=10))
    train, validation = (
        "\n\n".join(document.text for document in half)[:most]
        for half in (split.train, split.validation)
    )
    return encoded(train, validation, Path(corpus.removeprefix("file:")).name)


def encoded(train: str, validation: str, name: str) -> Text:
    """Return both halves as numbers."""
    characters = "".join(sorted({*train, *validation}))
    numbers = {character: number for number, character in enumerate(characters)}
    halves = (
        np.array([numbers[character] for character in half], dtype=np.int64)
        for half in (train, validation)
    )
    content = (train + validation).encode("utf8", "surrogatepass")
    return Text(f"{name} {hashlib.sha256(content).hexdigest()[:8]}", characters, *halves)


class Windows(Dataset):
    """Windows of a text, each with the next character at every position.

    Args:
        data: character numbers.
        starts: starts of the windows.
        length: length of a window.
    """

    def __init__(self, data: np.ndarray, starts: Sequence[int], length: int) -> None:
        self.data, self.starts, self.length = torch.from_numpy(data), starts, length

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a window, (length,), and the next character at each of its positions."""
        start = int(self.starts[index])
        end = start + self.length
        following = self.data[start + 1 : end + 1]
        # The model would shift labels itself, and lose the last label of each window.
        return {
            "input_ids": self.data[start:end],
            "labels": following,
            "shift_labels": following,
        }


def drawn(data: np.ndarray, count: int, length: int, seed: int) -> Windows:
    """Return random windows, drawn with replacement as in nanoGPT."""
    starts = np.random.default_rng(seed).integers(0, len(data) - length, count)
    return Windows(data, starts, length)


def side_by_side(data: np.ndarray, length: int, most: int | None = None) -> Windows:
    """Return windows that do not overlap: all of them, or ``most`` evenly spread ones."""
    starts = np.arange(0, len(data) - length, length)
    if most is not None and most < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
    return Windows(data, starts, length)
