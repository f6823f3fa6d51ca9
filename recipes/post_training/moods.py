"""Packaged rows: tweets in a good and in a bad mood, as people graded them.

In: how many rows to train on and to hold out. Out: rows in the forms that TRL reads. No tweet is in
two rows, and held-out tweets differ in wording from those to train on.
"""

from __future__ import annotations

import datasets
from shared import tweets
from shared.arguments import RecipeError

PROMPT = "Write a tweet in a {} mood.\n"


def preferences(train: int, held_out: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return rows ``prompt, chosen, rejected``; the prompt asks for a good mood."""
    return parts(train, held_out, pairs)


def completions(train: int, held_out: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return rows ``prompt, completion``, half of each mood."""
    return parts(train, held_out, prompted)


def parts(train: int, held_out: int, form):
    """Return both parts in a form."""
    rows = tweets.load(validation_rows=4000)
    return form(rows.train, train), form(rows.validation, held_out)


def pairs(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return ``count`` positive tweets, each preferred to a negative one."""
    good, bad = of_moods(rows, count)
    return datasets.Dataset.from_dict(
        {"prompt": [PROMPT.format("good")] * count, "chosen": good, "rejected": bad}
    )


def prompted(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return ``count`` tweets with prompts; every other one is in a bad mood."""
    good, bad = of_moods(rows, (count + 1) // 2)
    mixed = [text for both in zip(good, bad, strict=True) for text in both][:count]
    prompts = [PROMPT.format(("good", "bad")[number % 2]) for number in range(count)]
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": mixed})


def of_moods(rows: datasets.Dataset, count: int) -> tuple[list[str], list[str]]:
    """Return ``count`` positive and as many negative tweets.

    Raises:
        RecipeError: There are not enough tweets.
    """
    good, bad = (
        [row["text"] for row in rows if tweets.LABELS[row["label"]] == name]
        for name in ("positive", "negative")
    )
    most = min(len(good), len(bad))
    if count > most:
        raise RecipeError(f"{count} tweets of each mood were asked for; there are {most}.")
    return good[:count], bad[:count]
