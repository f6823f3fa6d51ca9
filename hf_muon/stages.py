"""The parts of an update rule: stages, their state, and what they are given.

In: nothing. Out: plain records. Stages work on lists of tensors: for small matrices, one call per
tensor would take longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_muon.polar import devices

BLOCK = 2048
"""Entries of a row that share a size where momentum is kept in int8."""

Momentum = float | tuple[float, ...] | Literal["auto"]
"""β, the β of each term of a kernel, or ``auto``."""


class Buffer(NamedTuple):
    """State that a stage keeps of each parameter; it begins as zeros.

    Attributes:
        name: Its key in the state. DeepSpeed's universal checkpoints hold only ``exp_avg`` and
            ``exp_avg_sq``; its ordinary ones hold any name.
        kind: ``entries``: a number for each entry of a matrix, sharded as the parameter is. For
            each matrix, the same on every rank: ``rows``: (m, 1), ``numbers``: (length,), or
            ``blocks``: (m, blocks of columns).
        dtype: None: ``momentum_dtype`` for entries, float32 for the rest.
        length: How many numbers.
        scales: Whether it is multiplied by f when all gradients are.
        squares: Whether it holds averages of squares, which are ≥ 0.
    """

    name: str
    kind: Literal["entries", "rows", "numbers", "blocks"] = "entries"
    dtype: torch.dtype | None = None
    length: int = 1
    scales: bool = True
    squares: bool = False

    @property
    def sizes(self) -> Buffer | None:
        """The buffer for the scales of blocks, if the entries may be kept in int8; else None."""
        if self.kind != "entries" or self.dtype is not None:
            return None
        return Buffer(f"{self.name}_scale", "blocks", scales=self.scales)

    def shape(self, matrices: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Shape of the buffer of several matrices, padded to the largest of them."""
        rows, cols = (max(sides) for sides in zip(*matrices, strict=True))
        of_one = {"rows": (rows,), "numbers": (self.length,), "blocks": (rows, blocks_in(cols))}
        return len(matrices), *of_one[self.kind]


def blocks_in(cols: int) -> int:
    """Number of int8 blocks in a row."""
    return -(-cols // BLOCK)


class Given(NamedTuple):
    """What a stage is given besides its tensors; sequences are aligned with the tensors.

    Attributes:
        settings: Of the param group.
        momentum: β of this step; one value per average if there are several.
        shapes: (m, n) of the whole matrix that each tensor is a piece of.
        whole: The result of the stage's :class:`Statistic` for the whole matrices; if it has
            numbers per row, those of the tensor's rows, (rows, …).
        steps: The number of this step for each tensor, from 1, if the stage counts.
        weights: The weights that belong to each tensor, for the stage that writes them.
        scale: The step-size factor, for the stage that writes.
    """

    settings: Mapping[str, Any]
    momentum: Momentum
    shapes: Sequence[tuple[int, int]] = ()
    whole: Sequence[Tensor] = ()
    steps: Sequence[int] = ()
    weights: Sequence[Tensor] = ()
    scale: float = 1.0

    @property
    def norms(self) -> Sequence[Tensor]:
        """Frobenius norms of the whole matrices, float64, for a stage that needs them."""
        return self.whole


Tensors = list[Tensor]
Run = Callable[[Tensors, tuple[Tensors, ...], Given], Tensors]


class Statistic(NamedTuple):
    """What a stage must know of whole matrices, of which a rank holds only pieces.

    Attributes:
        measure: ``measure(x, buffers, given)`` returns ``width`` numbers for each tensor of x,
            (width,), or for each of its rows, (rows, width). They are summed over all pieces of a
            matrix.
        conclude: ``conclude(sums, buffers, given)`` turns the sums of each matrix, float64,
            (width,) or (m, width), into what the stage gets as ``given.whole``. It gets only the
            buffers of rows and numbers, and it alone writes them.
        width: How many numbers.
        of_rows: Whether there are numbers for each row.
        of_input: Whether ``measure`` reads only x. After the map, a matrix's owner then measures
            the whole result, so that nothing depends on the sharding.
    """

    measure: Run
    conclude: Run
    width: int = 1
    of_rows: bool = False
    of_input: bool = True


class Stage(NamedTuple):
    """Elementwise work on the pieces of matrices that a rank holds.

    Attributes:
        run: ``run(x, buffers, given)`` returns a tensor (rows, cols) for each tensor of x, and may
            return buffers themselves. For each buffer of entries it gets a list aligned with x; it
            writes those and nothing else.
        buffers: The state that it keeps.
        needs: ``entries``: nothing more. ``matrices``: whole matrices as x, possible only where
            every rank holds them whole (one process, DDP); it may then also write buffers of rows.
            Or a :class:`Statistic`.
        may_fail: Whether it may raise; see :class:`WholeMap`.
        counts: Whether it needs ``given.steps``.
        may_refuse: Whether it may raise, but only in the first two steps of a matrix.
    """

    run: Run
    buffers: tuple[Buffer, ...] = ()
    needs: Literal["entries", "matrices"] | Statistic = "entries"
    may_fail: bool = True
    counts: bool = False
    may_refuse: bool = False

    @property
    def statistic(self) -> Statistic | None:
        """What it needs to know of whole matrices, if anything."""
        return self.needs if isinstance(self.needs, Statistic) else None


def wide(x: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if its dtype has more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_dtype_of(x: Tensors, like: Tensors) -> Tensors:
    """Return each tensor in the dtype of its counterpart in ``like``.

    Foreach functions fall back to one call per tensor on mixed dtypes, which costs an accelerator
    more than copying all tensors in one call.
    """
    pairs = list(zip(x, like, strict=True))
    if all(one.dtype == other.dtype for one, other in pairs):
        return x
    if devices.is_cpu(like[0].device):
        return [one.to(other.dtype) for one, other in pairs]
    same = [torch.empty_like(one, dtype=other.dtype) for one, other in pairs]
    torch._foreach_copy_(same, x)
    return same


def square_norm(x: Tensor) -> Tensor:
    """‖x‖² in float64 without a float64 copy of x; in float32 on devices without float64."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=devices.widest(x.device))
    return norm.square()


def _squares(x: Tensors, buffers: tuple[Tensors, ...], given: Given) -> Tensors:
    if devices.is_cpu(x[0].device):
        return [square_norm(one)[None] for one in x]
    norms = torch.stack(torch._foreach_norm(x, 2, devices.widest(x[0].device)))
    return list(norms.square()[:, None].unbind())


def _roots(sums: Tensors, buffers: tuple[Tensors, ...], given: Given) -> Tensors:
    return list(torch.cat(sums).sqrt().unbind())


NORMS = Statistic(_squares, _roots)
"""Frobenius norms."""


class WholeMap(NamedTuple):
    """The function of whole matrices, which their owner computes.

    Attributes:
        run: ``run(X, polar, settings)`` returns a tensor of the shape of X, (m, n); ``polar(X)`` is
            the polar factor with the group's settings. For LoRA pairs,
            ``run(weights, gradients, size, polar, settings)`` returns the changes of A and of B.
        of_pairs: Whether it updates LoRA's A and B together.
        balances: Whether it makes the norms of A and B about equal from time to time.
        replaces: Whether it is the polar factor: ``polar`` may then write over X, and X may be a
            batch (k, m, n) that includes transposes.
        decomposes: Whether it takes an SVD, for which X must come in full precision.
        may_fail: Whether it may raise for finite input. The step then keeps copies of what it
            writes, so that it changes everything or nothing.
    """

    run: Callable[..., Any]
    of_pairs: bool = False
    balances: bool = False
    replaces: bool = False
    decomposes: bool = False
    may_fail: bool = True


class Rule(NamedTuple):
    """An update rule; its stage ``write`` gets updates and changes ``given.weights``."""

    before: tuple[Stage, ...]
    whole: WholeMap
    after: tuple[Stage, ...]
    write: Stage

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages before the map and after it."""
        return (*self.before, *self.after, self.write)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The state of all stages."""
        return tuple(buffer for stage in self.stages for buffer in stage.buffers)

    @property
    def may_fail(self) -> bool:
        """Whether the map or a stage may raise for finite input."""
        return self.whole.may_fail or any(stage.may_fail for stage in self.stages)

    @property
    def may_refuse(self) -> bool:
        """Whether a stage may raise in the first steps."""
        return any(stage.may_refuse for stage in self.stages)


def concluded(stage: Stage, x: Tensors, buffers: tuple[Tensors, ...], given: Given) -> Tensors:
    """Compute a stage's statistic for whole matrices, given their pieces x."""
    statistic = stage.statistic
    if statistic is None:
        return []
    sums = [one.to(devices.widest(one.device)) for one in statistic.measure(x, buffers, given)]
    return statistic.conclude(sums, of_matrices(stage, buffers), given)


def of_matrices(stage: Stage, buffers: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
    """Return the buffers of whole matrices, without those of entries."""
    both = zip(stage.buffers, buffers, strict=True)
    return tuple(of_buffer for buffer, of_buffer in both if buffer.kind != "entries")
