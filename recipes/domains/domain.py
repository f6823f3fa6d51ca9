"""A domain: rows to train on, held-out rows, a model, and its evaluation.

In: tensors and a model. Out: batches; the held-out loss and the metrics that the field uses.
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
        held_out: rows that training does not use.
        model: builds the untrained model, which returns logits, from the global seed.
        loss: computes the mean loss of logits and targets.
        metrics: compute further means over rows from logits and targets, by name.
        steps: number of steps of a training.
        batch: number of rows per step.
        augment: changes the inputs of a batch. Default: leaves them as they are.
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
        """Return a batch of random rows, drawn without replacement."""
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
        """Split rows into pieces for the evaluation."""
        return rows.split(SLICE)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of rows whose label is predicted correctly."""
    return (logits.argmax(-1) == labels).float().mean()
