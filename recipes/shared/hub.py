"""The rows of a recipe: packaged rows, or those of a dataset on the Hub or in a folder.

In: settings that name a dataset, and the number of rows. Out: rows to train on, and rows that are
held out, with the dataset's columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import datasets

from shared.arguments import RecipeError

Parts = tuple[datasets.Dataset, datasets.Dataset]


@dataclass
class Rows:
    """Where rows come from, and how many there are."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "A folder or a Hub dataset (owner/name); by default the packaged rows."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub dataset."}
    )
    train_rows: int | None = field(
        default=None, metadata={"help": "At most so many rows to train on; by default all."}
    )
    validation_rows: int = field(default=400, metadata={"help": "Rows that are held out."})

    def parts(self, packaged: Callable[[int, int], Parts], most: int) -> Parts:
        """Return training rows and held-out rows.

        Args:
            packaged: makes the packaged rows, given the number to train on and to hold out.
            most: number of packaged training rows, if the settings do not give it.
        """
        if self.dataset is None:
            return packaged(self.train_rows or most, self.validation_rows)
        return load(self.dataset, self.dataset_config, self.train_rows, self.validation_rows)


def load(name: str, config: str | None, train_rows: int | None, validation_rows: int) -> Parts:
    """Return training rows, and ``validation_rows`` that are held out.

    They are the first rows of the validation or test split or, if there is neither, of the train
    split.

    Raises:
        RecipeError: the dataset cannot be opened, or has too few rows.
    """
    try:
        parts = datasets.load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"The dataset {name!r} could not be opened: {error} A dataset of the Hub needs "
            "the network (and HF_HUB_OFFLINE unset)."
        ) from error
    train = parts["train"]
    held_out = parts.get("validation", parts.get("test"))
    if held_out is None:
        held_out = train.select(range(min(validation_rows, len(train))))
        train = train.select(range(len(held_out), len(train)))
    held_out = held_out.select(range(min(validation_rows, len(held_out))))
    if train_rows is not None:
        train = train.select(range(min(train_rows, len(train))))
    if len(train) == 0 or len(held_out) == 0:
        raise RecipeError(
            f"The dataset {name!r} leaves {len(train)} rows to train on and "
            f"{len(held_out)} to validate on. Lower --validation_rows, or choose another."
        )
    return train, held_out
