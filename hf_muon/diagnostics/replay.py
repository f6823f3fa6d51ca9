"""Apply an order of momentum and polar factor to recorded gradients, without weights.

In: gradients in the order of their steps, and the settings of the optimizer. Out: the update
directions that the optimizer would have applied, before learning rate, step-size factor and decay.
The stages are the optimizer's own functions; you may add filters before and after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_muon.config import MuonConfig
from hf_muon.optimizer.momentum import momentum_at
from hf_muon.optimizer.step import polar_function
from hf_muon.rules import FILTERS, rule_of
from hf_muon.stages import Buffer, Given, Momentum, Stage, WholeMap, concluded

Filter = Callable[[Iterable[Tensor]], Iterable[Tensor]]
"""From a stream of tensors to a stream of tensors, one for each step. Its memory lives in the call,
so that one filter serves many streams; ``functools.partial(map, f)`` makes one of a function."""


def ema(momentum: float, nesterov: bool = False, dtype: torch.dtype | None = None) -> Filter:
    """The optimizer's momentum as a filter: M ← βM + (1−β)X, M₀ = 0; Nesterov: (1−β)X + βM.

    Args:
        momentum: β in [0, 1).
        nesterov: Whether to look ahead.
        dtype: Of the buffer M. Default: that of the first tensor.
    """
    settings = MuonConfig(momentum=momentum, nesterov=nesterov)
    return streamed(FILTERS["ema"], vars(settings), dtype)


def streamed(stage: Stage, settings: Mapping[str, Any], dtype: torch.dtype | None = None) -> Filter:
    """Turn a stage of the optimizer's rules into a filter of streams; ``dtype``: of its buffers."""

    def run(stream: Iterable[Tensor]) -> Iterator[Tensor]:
        buffers: tuple[list[Tensor], ...] = ()
        for step, tensor in enumerate(stream):
            x = _matrices(stage, tensor)
            if step == 0:
                buffers = tuple([_zeros(b, one, dtype) for one in x] for b in stage.buffers)
            shapes = [(one.shape[-2], one.shape[-1]) for one in x]
            momentum = momentum_at(settings, step)
            given = Given(settings, momentum, shapes, steps=[step + 1] * len(x))
            given = given._replace(whole=concluded(stage, x, buffers, given))
            found = stage.run(x, buffers, given)
            kept = any(y is one for of_buffer in buffers for y in found for one in of_buffer)
            yield torch.stack(found).view(tensor.shape) if len(x) > 1 or kept else found[0]

    return run


def _matrices(stage: Stage, x: Tensor) -> list[Tensor]:
    """Return a stage's tensors: all matrices at once, or each alone if it needs whole ones."""
    return [x] if stage.needs == "entries" else list(x.reshape(-1, *x.shape[-2:]))


def _zeros(buffer: Buffer, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    sides = {"entries": x.shape, "rows": (*x.shape[:-1], 1), "numbers": (buffer.length,)}
    kept = (dtype or x.dtype) if buffer.kind == "entries" else torch.float32
    return torch.zeros(sides[buffer.kind], dtype=buffer.dtype or kept, device=x.device)


class Stages(NamedTuple):
    """A step as a sequence: before ─► polar ─► after.

    Attributes:
        before: Filters of the gradients, first to last.
        polar: The polar factor.
        after: Filters of the polar factors, first to last.
    """

    before: tuple[Filter, ...]
    polar: Callable[[Tensor], Tensor]
    after: tuple[Filter, ...]

    def updates(self, gradients: Iterable[Tensor]) -> Iterable[Tensor]:
        """Return the update directions of a stream of gradients."""
        return through(map(self.polar, through(gradients, self.before)), self.after)


def through(stream: Iterable[Tensor], filters: Sequence[Filter]) -> Iterable[Tensor]:
    """Pass a stream through some filters."""
    for one in filters:
        stream = one(stream)
    return stream


def stages(
    config: MuonConfig,
    *,
    dtype: torch.dtype | None = None,
    before: Filter | None = None,
    after: Filter | None = None,
) -> Stages:
    """Return the stages of an order.

    Args:
        config: Gives the rule and its settings.
        dtype: Of the momentum buffer. Default: that of the filtered tensors.
        before: An additional filter of the raw gradients, before everything else.
        after: An additional filter of the updates, after everything else.
    """
    settings = vars(config)
    rule = rule_of(settings)
    as_filter = partial(streamed, settings=settings, dtype=dtype)
    return Stages(
        before=(*([before] if before else ()), *map(as_filter, rule.before)),
        polar=_mapping(rule.whole, settings),
        after=(*map(as_filter, rule.after), *([after] if after else ())),
    )


def _mapping(whole: WholeMap, settings: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return the map as a function of any number of matrices."""
    run = partial(whole.run, polar=polar_function(settings), settings=settings)
    if whole.replaces:
        return run
    return lambda X: torch.stack([run(one) for one in X.reshape(-1, *X.shape[-2:])]).view(X.shape)


def replay(
    gradients: Tensor | Iterable[Tensor],
    order: str = "pre_polar",
    momentum: Momentum = 0.95,
    nesterov: bool = True,
    *,
    polar_method: str = "svd",
    before: Filter | None = None,
    after: Filter | None = None,
    **settings: Any,
) -> Tensor:
    """Return the update direction of every step; ``W ← W − lr·scale·update`` would apply it.

    ::

        pre_polar   gradient ─► before ─► momentum ─► polar ─► after ─► update
        post_polar  gradient ─► before ─► polar ─► momentum ─► after ─► update
        polar_only  gradient ─► before ─► polar ─► after ─► update

    Args:
        gradients: (K, …, m, n), or K tensors (…, m, n), in the order of the steps. Leading
            dimensions are independent matrices. The dtype is that of the momentum buffer.
        order: ``pre_polar``, ``post_polar`` or ``polar_only``.
        momentum: β in [0, 1).
        nesterov: Whether the momentum looks ahead.
        polar_method: Default: the exact polar factor.
        before: An additional filter of the gradients, such as clipping of entries:
            ``partial(map, clip)``. It takes the stream of all steps and returns one of the same
            length. With ``polar_only`` it is the only filter, in place of the momentum.
        after: An additional filter of the updates.
        **settings: Further fields of :class:`~hf_muon.MuonConfig`, such as ``filter``,
            ``matrix_map``, ``rescale``, ``match_update_rms``, ``coefficients``, ``polar_steps``.

    Returns:
        Updates, (K, …, m, n).

    Raises:
        ValueError: A setting is not allowed, there are no gradients, or a filter loses steps.

    Example:
        >>> smoothing = lambda stream: ((x + y) / 2 for x, y in pairwise(chain([0], stream)))
        >>> replay(gradients, "polar_only", before=smoothing)  # two-step FIR in place of the EMA
    """
    steps = list(gradients)
    if not steps:
        raise ValueError("There is no gradient to replay; one for each step is needed.")
    config = MuonConfig(
        order=order,  # type: ignore[arg-type]  # checked by the constructor, like the others
        momentum=momentum,
        nesterov=nesterov,
        polar_method=polar_method,  # type: ignore[arg-type]
        **settings,
    )
    chosen = stages(config, dtype=steps[0].dtype, before=before, after=after)
    updates = list(chosen.updates(steps))
    if len(updates) != len(steps):
        raise ValueError(
            f"A filter made {len(updates)} steps out of {len(steps)}; it must give one tensor for "
            "each that it takes."
        )
    return torch.stack(updates)
