"""Measure some matrices of a Muon optimizer from inside its steps.

In: an optimizer and the names of matrices. Out: numbers by name for the sampled steps. Under
DeepSpeed gradients exist only inside ``optimizer.step()``, so everything happens in hooks of the
step. Nothing of the optimizer is written and no random number is drawn. All ranks must sample the
same steps, because they gather matrices together.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_muon.diagnostics.advice import advise, is_far_enough
from hf_muon.diagnostics.averages import Averages, is_kept_by_optimizer
from hf_muon.diagnostics.spectra import Leading, StepMatrices, measure, turned
from hf_muon.diagnostics.watched import Watch, Watched
from hf_muon.diagnostics.whole import on_first_rank, whole_matrices
from hf_muon.distributed.buckets import Unit
from hf_muon.distributed.exchange import Read
from hf_muon.distributed.find import local, local_gradient
from hf_muon.distributed.layout import Piece
from hf_muon.optimizer import Muon
from hf_muon.optimizer.auto_momentum import momenta_in_use
from hf_muon.optimizer.entries import Entry
from hf_muon.optimizer.pairs import moves_pairs
from hf_muon.optimizer.step import polar_function
from hf_muon.rules import MAPS, rule_of

logger = logging.getLogger(__name__)

Values = dict[str, dict[str, float]]


class Sampler:
    """Measures matrices in the steps that :meth:`ask` selects.

    Args:
        optimizer: The optimizer to watch.
        names: Names of matrices from :func:`~hf_muon.diagnostics.watched.matrix_names`.
        count: How many singular values to return.
    """

    def __init__(self, optimizer: Muon, names: Sequence[str], count: int) -> None:
        self._optimizer = optimizer
        self._watch = Watch(optimizer, names)
        self._averages = Averages(optimizer)
        self._count = count
        self._step: int | None = None
        self._values: Values = {}
        self._leading: dict[str, list[Leading]] = defaultdict(list)
        self._weights: dict[tuple[str, Piece], Tensor] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()

    @property
    def asked(self) -> bool:
        """Whether a sample was requested and not yet collected."""
        return self._step is not None

    def ask(self, step: int) -> None:
        """Measure the calls of ``optimizer.step()`` until :meth:`answer`, as one step."""
        self._step, self._values = step, {}

    def answer(self) -> Values:
        """Return the measurements, on rank 0; none if the step was skipped. All ranks must call."""
        self._step = None
        self._weights.clear()
        found: Values = {}
        for of_rank in on_first_rank(self._values):
            found |= of_rank
        return dict(sorted(found.items()))

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        """Keep the weights; their change is the update."""
        if self._step is None:
            return
        for call in self._watch.call():
            for unit, piece in call.pieces():
                tensor = local(call.entries[unit.parameter].tensor)
                self._weights[call.name(unit), piece] = piece.of_local(tensor).clone()

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        """Measure if asked to; and update the averages that the optimizer does not keep."""
        if self._step is None and all(map(is_kept_by_optimizer, self._optimizer.param_groups)):
            return
        for call in self._watch.call():
            self._averages.go_on(call)
            if self._step is not None:
                self._measure(self._step, call)

    def _measure(self, step: int, call: Watched) -> None:
        """Measure the matrices of this call that this rank owns."""
        dtype = torch.promote_types(call.entries[0].tensor.dtype, torch.float32)
        gradient = _pieces_of([local_gradient(entry.tensor) for entry in call.entries])
        weight = _pieces_of([local(entry.tensor) for entry in call.entries])

        def update(unit: Unit, piece: Piece) -> Tensor:
            return weight(unit, piece).to(dtype) - self._weights[call.name(unit), piece].to(dtype)

        reads = (gradient, partial(self._averages.piece, call), weight, update)
        for unit, (G, M, W, change) in whole_matrices(call.buckets, reads, dtype):
            entry, name = call.entries[unit.parameter], call.name(unit)
            if not self._averages.has_run_in(name):
                continue
            try:
                momentum = self._averages.momentum(entry, unit.matrix)
                X, P = self._factored(entry, momentum, G, M)
                matrices = StepMatrices(G, M, W, change, X, P)
                self._values[name] = self._numbers(name, step, matrices, momentum)
                self._values[name].update(self._chosen(entry, unit))
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                # On one rank only: if it raised, the others would wait.
                logger.warning("%s is not measured in step %d: %s", name, step, error)

    def _chosen(self, entry: Entry, unit: Unit) -> dict[str, float]:
        """Return β of a matrix, if ``momentum="auto"`` has chosen it."""
        scores = self._optimizer.state[entry.tensor].get("momentum_scores")
        return {} if scores is None else {"momentum": momenta_in_use(scores)[unit.matrix]}

    def _factored(
        self, entry: Entry, momentum: float, G: Tensor, M: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the input of the polar factor, and the polar factor, computed again.

        It is the same function of the same matrix. Low precision, or a learning rate of zero, would
        hide it in the weights.
        """
        group, dtype = entry.group, self._averages.dtype(entry)
        rule = rule_of(group)
        X = G
        if dtype is not None:
            X = M.to(dtype)
            if group["nesterov"]:
                X = torch.lerp(G.to(dtype), X, momentum)
        if rule.whole is not MAPS["polar"] or (rule.before and dtype is None):
            return X.to(G.dtype), None
        return X.to(G.dtype), polar_function(group)(X).to(G.dtype)

    def _numbers(
        self, name: str, step: int, matrices: StepMatrices, momentum: float
    ) -> dict[str, float]:
        """Return the numbers of a sample, including the comparison with earlier samples."""
        values, now = measure(step, matrices, momentum, self._count)
        earlier = self._leading[name]
        if earlier:
            values.update(turned(earlier[-1], now))
        # Of the samples that are far enough for advice, only the newest is needed.
        far = [sample for sample in earlier if is_far_enough(sample, now, momentum)]
        values.update(advise(far[-1] if far else None, now, momentum))
        self._leading[name] = [*far[-1:], *earlier[len(far) :], now]
        return values


def _pieces_of(tensors: Sequence[Tensor]) -> Read:
    return lambda unit, piece: piece.of_local(tensors[unit.parameter])


def left_out(groups: Sequence[dict[str, Any]], *, resumed: bool) -> Iterator[str]:
    """Yield what cannot be measured in a run, as the ends of sentences."""
    if resumed and not all(map(is_kept_by_optimizer, groups)):
        yield (
            "begins three windows 3/(1-momentum) from here: order={order!r} with momentum="
            "{momentum!r}, prefilter={prefilter!r} and momentum_dtype={momentum_dtype!r} keeps no "
            "single average of gradients in full precision, and a checkpoint has none of the "
            "monitor's, which must run in.".format_map(groups[0])
        )
    if any(map(moves_pairs, groups)):
        yield (
            "leaves out orthogonality_error, factor_smallest and factor_largest of adapters: "
            f"lora_update={groups[0]['lora_update']!r} applies no polar factor of one matrix."
        )
