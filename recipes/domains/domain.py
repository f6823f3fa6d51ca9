"""What the domains have in common: rows to train on, rows held out, a model, and what it is worth.

In: tensors and a model. Out: batches, and the held-out loss with what people in the field count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Rows = tuple[Tensor, ...]
"""Inputs and targets, each (rows, …)."""
SLICE = 256
"""Rows of the held-out ones that are computed at once."""


@dataclass(frozen=True)
class Domain:
    """A small problem.

    Attributes:
        train: rows to train on.
        held_out: rows that are not seen in training.
        model: builds the untrained model from the global seed; it returns logits.
        loss: of logits and targets.
        metrics: further figures by name, each a mean over rows of logits and targets.
        steps: of a training.
        batch: rows of a step.
        augment: changes the inputs of a batch.
    """

    train: Rows
    held_out: Rows
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
    steps: int
    batch: int
    augment: Callable[[Tensor, torch.Generator], Tensor] = field(default=lambda x, generator: x)

    def drawn(self, generator: torch.Generator) -> Rows:
        """Return a batch of random rows, each at most once."""
        chosen = torch.randperm(len(self.train[0]), generator=generator)[: self.batch]
        inputs, *others = (of_all[chosen] for of_all in self.train)
        return self.augment(inputs, generator), *others

    @torch.no_grad()
    def worth(self, model: nn.Module) -> dict[str, float]:
        """Return the held-out loss and the metrics."""
        model.eval()
        slices = [(x, y, model(x)) for x, y in zip(*map(self.sliced, self.held_out), strict=True)]
        kinds = {"loss": self.loss, **self.metrics}
        count = len(self.held_out[0])
        return {
            name: sum(float(kind(logits, y)) * len(x) for x, y, logits in slices) / count
            for name, kind in kinds.items()
        }

    @staticmethod
    def sliced(rows: Tensor) -> tuple[Tensor, ...]:
        """Return the rows in pieces."""
        return rows.split(SLICE)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of rows whose label is told."""
    return (logits.argmax(-1) == labels).float().mean()
