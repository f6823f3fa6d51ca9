"""The moving average of gradients, under any order.

In: the watched matrices of the latest step. Out: pieces of M_t = βM_{t−1} + (1−β)G_t. Under
``pre_polar`` the optimizer has this average. Under the other orders it does not, and one is kept
here, only for the watched matrices and the pieces that this rank reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_muon.diagnostics.watched import Watched
from hf_muon.distributed.buckets import Unit
from hf_muon.distributed.find import local, local_gradient
from hf_muon.distributed.layout import Piece
from hf_muon.optimizer import Muon
from hf_muon.optimizer.entries import Entry
from hf_muon.optimizer.momentum import single
from hf_muon.rules import FILTERS, rule_of

# The largest weight that gradients from before a resume, which are missing, may have in an average:
# reached after three windows.
_MAY_MISS = 0.05


def is_kept_by_optimizer(group: dict[str, Any]) -> bool:
    """Whether the optimizer keeps the average of a group's gradients."""
    if group["algorithm"] != "muon":
        return True
    return rule_of(group).before == (FILTERS["ema"],) and group["momentum_dtype"] != "int8"


class Averages:
    """Moving averages of the watched matrices.

    Args:
        optimizer: The optimizer to watch.
    """

    def __init__(self, optimizer: Muon) -> None:
        self._optimizer = optimizer
        self._kept: dict[tuple[str, Piece], Tensor] = {}
        self._missing: dict[str, float] = {}

    def momentum(self, entry: Entry, matrix: int = 0) -> float:
        """β of the latest step, or that of a single average with the filter's mean age."""
        if entry.group.get("momenta"):
            return float(entry.each(entry.group["momenta"])[matrix])
        return single(entry.group, self._steps_before(entry))

    def _steps_before(self, entry: Entry) -> int:
        return int(self._optimizer.state[entry.tensor]["step"]) - 1

    def go_on(self, call: Watched) -> None:
        """Add the gradients of a step; after a resume the earlier ones are missing."""
        if is_kept_by_optimizer(call.group):
            return
        for entry, names in zip(call.entries, call.names, strict=True):
            for name in names:
                missing = self._missing.setdefault(name, float(self._steps_before(entry) > 0))
                self._missing[name] = missing * self.momentum(entry)
        gradients = [local_gradient(entry.tensor) for entry in call.entries]
        for unit, piece in call.pieces():
            gradient, key = piece.of_local(gradients[unit.parameter]), (call.name(unit), piece)
            if key not in self._kept:
                self._kept[key] = torch.zeros_like(gradient)
            self._kept[key].lerp_(
                gradient, 1 - self.momentum(call.entries[unit.parameter], unit.matrix)
            )

    def has_run_in(self, name: str) -> bool:
        """Whether gradients missing since a resume hardly count in a matrix's average any more."""
        return self._missing.get(name, 0.0) <= _MAY_MISS

    def piece(self, call: Watched, unit: Unit, piece: Piece) -> Tensor:
        """Return a piece of the average, (rows, cols); do not write to it."""
        if not is_kept_by_optimizer(call.group):
            return self._kept[call.name(unit), piece]
        state = self._optimizer.state[call.entries[unit.parameter].tensor]
        return piece.of_local(local(state["exp_avg"]))

    def dtype(self, entry: Entry) -> torch.dtype | None:
        """The dtype of the optimizer's momentum, if that is this average."""
        if not is_kept_by_optimizer(entry.group):
            return None
        dtype: torch.dtype = self._optimizer.state[entry.tensor]["exp_avg"].dtype
        return dtype
