"""How many directions the inputs of linear layers have, at sampled steps.

In: a model and the names of matrices. Out: the stable rank ‖A‖_F²/‖A‖₂² of the input of each
matrix's layer, where A has one row per token. Hooks are installed only in sampled steps; they read,
and draw no random numbers. Layers other than ``nn.Linear``, or with partial inputs, are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_muon.diagnostics.gradients import parameter_of
from hf_muon.diagnostics.whole import on_first_rank
from hf_muon.polar import in_own_dtype
from hf_muon.routing.survey import named_modules

# At most so many tokens per step and rank are examined.
MOST_TOKENS = 4096


class Activations:
    """Measures the inputs of some layers between :meth:`ask` and :meth:`answer`.

    Args:
        model: The model that the layers are in; it may be wrapped.
        names: Names of matrices from :func:`~hf_muon.diagnostics.watched.matrix_names`.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        matrices: dict[str, list[str]] = defaultdict(list)
        for name in names:
            matrices[parameter_of(name)].append(name)
        self._layers = [
            (module, matrices[f"{name}.weight"])
            for _, name, module in named_modules(model)
            if isinstance(module, nn.Linear) and f"{name}.weight" in matrices
        ]
        self._inputs: list[_Inputs] = []
        self._hooks: list[RemovableHandle] = []

    def ask(self) -> None:
        """Start measuring inputs."""
        self.remove()
        self._inputs = [_Inputs(module.in_features) for module, _ in self._layers]
        self._hooks = [
            module.register_forward_pre_hook(inputs.look)
            for (module, _), inputs in zip(self._layers, self._inputs, strict=True)
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def answer(self) -> dict[str, float]:
        """Return stable ranks by matrix, on rank 0: the mean over ranks, in the matrices' order.

        Every rank must call it; each has measured its own batches.
        """
        self.remove()
        found = {
            name: rank
            for (_, names), inputs in zip(self._layers, self._inputs, strict=True)
            if (rank := inputs.stable_rank()) is not None
            for name in names
        }
        self._inputs = []
        together: dict[str, list[float]] = defaultdict(list)
        for part in on_first_rank(found):
            for name, rank in part.items():
                together[name].append(rank)
        return {name: sum(ranks) / len(ranks) for name, ranks in together.items()}


class _Inputs:
    """Some rows of one layer's inputs, spread evenly over each call."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: list[Tensor] = []
        self._count = 0
        self._rank: float | None = None

    @torch.no_grad()
    def look(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Keep rows; once there are enough, keep only their stable rank."""
        room = MOST_TOKENS - self._count
        if room <= 0 or not inputs or not _is_whole(inputs[0], self._width):
            return
        x = inputs[0]
        rows = x.detach().reshape(-1, self._width)
        rows = rows[:: math.ceil(len(rows) / room)].clone()
        self._rows.append(rows)
        self._count += len(rows)
        if self._count >= MOST_TOKENS:
            self._rank = self.stable_rank()
            self._rows = []

    def stable_rank(self) -> float | None:
        """Stable rank of the rows so far; None if there are none, all zero, or not finite."""
        if not self._rows:
            return self._rank
        return rank_of_rows(torch.cat(self._rows))


def _is_whole(x: Any, width: int) -> bool:
    """Whether an input has all features; DTensors and inputs divided among ranks do not."""
    if not isinstance(x, Tensor) or hasattr(x, "placements"):
        return False
    return x.ndim > 0 and x.shape[-1] == width and x.numel() > 0


def rank_of_rows(A: Tensor) -> float | None:
    """Return ‖A‖_F²/‖A‖₂² in float64, through the Gram matrix of the smaller side.

    Args:
        A: (tokens, features).

    Returns:
        The stable rank; None if A is zero or not finite.
    """
    A = (A.cpu() if A.device.type == "mps" else A).double()  # MPS has no float64
    A = A / A.abs().max()
    if not A.isfinite().all():
        return None
    with in_own_dtype(A.device.type):
        gram = A @ A.mT if len(A) < A.shape[1] else A.mT @ A
    rank: float = (gram.trace() / torch.linalg.eigvalsh(gram)[-1]).item()
    return rank
