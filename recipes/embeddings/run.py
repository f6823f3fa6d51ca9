"""Fine-tune a sentence encoder with sentence-transformers and Muon.

In: ``python run.py configs/minilm.yaml [--dataset owner/name] [--optim adamw_torch] ...``. Out: in
``--output_dir`` the encoder, ``results.json`` with the share of held-out triplets whose similar
texts are nearest, before and after, and ``muon_report.json``; on the screen both shares and the
neighbors of three texts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import datasets
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric, TripletLoss
from shared import compared, hub, tweets
from shared.arguments import RecipeError, read
from shared.assets import opened
from shared.processes import check_world_size
from shared.progress import quiet_libraries
from transformers import set_seed

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

HERE = Path(__file__).parent


PACKAGED = 1200


@dataclass
class Settings(hub.Rows):
    """The encoder and its triplets: a dataset has columns anchor, positive and negative."""

    model: str = field(
        default="minilm", metadata={"help": "minilm, a folder, or a Hub model (owner/name)."}
    )


def main(argv: list[str]) -> dict[str, Any] | None:
    """Train, and return the results; see :func:`shared.compared.train`."""
    kinds = (Settings, SentenceTransformerTrainingArguments)
    settings, args = read(argv, kinds, HERE).made()
    check_world_size(args)
    quiet_libraries()
    set_seed(args.seed)
    train, held_out = settings.parts(packaged, PACKAGED)
    model = opened(SentenceTransformer, settings.model, device=str(args.device))
    # Not an in-batch-negatives loss: half of a batch has the same sentiment.
    loss = TripletLoss(model, TripletDistanceMetric.COSINE, triplet_margin=0.5)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=train, loss=loss)
    return compared.train(
        trainer,
        lambda: {"accuracy": accuracy(model, held_out)},
        lambda: neighbors(model, held_out),
        settings=vars(settings),
        train_rows=len(train),
        validation_rows=len(held_out),
    )


def packaged(train: int, held_out: int) -> hub.Parts:
    """Return triplets of tweets; the two of one sentiment are the similar ones."""
    split = tweets.load(validation_rows=4000)
    return of_sentiments(split.train, train), of_sentiments(split.validation, held_out)


def of_sentiments(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return ``count`` triplets: two tweets of one sentiment, and one of the opposite sentiment.

    Raises:
        RecipeError: There are not enough tweets.
    """
    texts: dict[str, list[str]] = {label: [] for label in tweets.LABELS}
    for row in rows:
        texts[tweets.LABELS[row["label"]]].append(row["text"])
    good, bad = texts["positive"], texts["negative"]
    most = 2 * (min(len(good), len(bad)) // 3)
    if count > most:
        raise RecipeError(f"{count} triplets were asked for; the tweets make {most}.")
    columns: dict[str, list[str]] = {"anchor": [], "positive": [], "negative": []}
    for number in range(count):
        alike, other = (good, bad) if number % 2 else (bad, good)
        for name, pile in (("anchor", alike), ("positive", alike), ("negative", other)):
            columns[name].append(pile.pop())
    return datasets.Dataset.from_dict(columns)


def accuracy(model: SentenceTransformer, rows: datasets.Dataset) -> float:
    """Return the share of triplets whose anchor is nearer to the positive than to the negative."""
    told = TripletEvaluator(rows["anchor"][:], rows["positive"][:], rows["negative"][:])
    return told(model)["cosine_accuracy"]


def neighbors(model: SentenceTransformer, rows: datasets.Dataset) -> list[str]:
    """Return, for each of three texts, the nearest of 100 others."""
    asked, known = rows["anchor"][:3], [*rows["positive"][:50], *rows["negative"][:50]]
    nearest = model.similarity(model.encode(asked), model.encode(known)).argmax(-1).tolist()
    return [f"{text!r} → {known[place]!r}" for text, place in zip(asked, nearest, strict=True)]


if __name__ == "__main__":
    compared.ended(main)
