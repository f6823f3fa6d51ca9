"""Three held-out tweets, and the fine-tuned model's predictions for them.

In: a ``Trainer`` after training, the held-out rows, and a function that encodes rows for its task.
Out: text, prediction and label of three tweets, one for each label if possible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import datasets
from shared import tweets
from transformers import Trainer

WIDTH = 76


class Example(TypedDict):
    """A held-out tweet with its prediction and label."""

    text: str
    prediction: str
    label: str


def examples(
    trainer: Trainer,
    held_out: datasets.Dataset,
    encode: Callable[[datasets.Dataset], datasets.Dataset],
) -> list[Example]:
    """Predict the first held-out tweet of each label; all processes must call this.

    If a label is missing, another tweet takes its place.
    """
    labels = held_out["label"][:]
    first = [labels.index(label) for label in sorted({*labels})]
    others = [place for place in range(len(labels)) if place not in first]
    rows = held_out.select([*first, *others][: len(tweets.LABELS)])
    # Both tasks give scores of the three labels, (rows, 3).
    chosen = trainer.predict(encode(rows), metric_key_prefix="example").predictions.argmax(-1)
    return [
        Example(text=text, prediction=tweets.LABELS[found], label=tweets.LABELS[label])
        for text, found, label in zip(rows["text"][:], chosen, rows["label"][:], strict=True)
    ]


def shown(found: Sequence[Example]) -> str:
    """Return a heading and one line per tweet."""
    lines = ["held-out tweets, with the model's answer and that of the people who graded them:"]
    for one in found:
        text = " ".join(one["text"].split())
        text = text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
        mark = "✓" if one["prediction"] == one["label"] else "✗"
        lines.append(f"  {mark} {one['prediction']:8} (graded {one['label']:8})  {text}")
    return "\n".join(lines)
