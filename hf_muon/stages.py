"""What an update rule is made of: stages, what they keep, and what they are told.

In: nothing. Out: plain records. Stages work on lists of tensors, because a call for each would take
longer than its arithmetic where matrices are small.
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
    """What a stage keeps of each parameter from step to step; it begins with zeros.

    Attributes:
        name: Its key in the state. DeepSpeed's universal checkpoints hold ``exp_avg`` and
            ``exp_avg_sq`` only; its ordinary ones hold any.
        kind: ``entries``: a number for each entry of a matrix, sharded as the parameter is;
            ``rows``: (m, 1), ``numbers``: (length,) and ``blocks``: (m, blocks of columns) for each
            matrix, the same on every rank.
        dtype: None: what ``momentum_dtype`` says for entries, float32 for the rest.
        length: How many numbers.
        scales: Whether it is multiplied by f where all gradients are.
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
        """Where the sizes of blocks are kept if the entries may be kept in int8."""
        if self.kind != "entries" or self.dtype is not None:
            return None
        return Buffer(f"{self.name}_scale", "blocks", scales=self.scales)

    def shape(self, matrices: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Shape of what is kept of matrices, each as large as the largest of them needs."""
        rows, cols = (max(sides) for sides in zip(*matrices, strict=True))
        of_one = {"rows": (rows,), "numbers": (self.length,), "blocks": (rows, blocks_in(cols))}
        return len(matrices), *of_one[self.kind]


def blocks_in(cols: int) -> int:
    """How many blocks a row has."""
    return -(-cols // BLOCK)


class Given(NamedTuple):
    """What a stage is told beside its tensors; sequences are aligned with them.

    Attributes:
        settings: Of the param group.
        momentum: β of this step, or of each term of a kernel.
        shapes: (m, n) of the whole matrix that each tensor is a part of.
        whole: What the stage's :class:`Statistic` found of the whole matrices; of rows, those of
            the tensor, (rows, …).
        steps: The number of this step for each, from 1, if the stage counts.
        weights: The weights that belong to each tensor, for what writes them.
        scale: The step-size factor, for what writes.
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
        """Frobenius norms of the whole matrices, float64, of a stage that needs them."""
        return self.whole


Tensors = list[Tensor]
Run = Callable[[Tensors, tuple[Tensors, ...], Given], Tensors]


class Statistic(NamedTuple):
    """What a stage must know of whole matrices, of which a rank holds pieces.

    Attributes:
        measure: ``measure(x, buffers, given)`` gives ``width`` numbers for each of x, (width,), or
            for each of its rows, (rows, width). They are added up over all pieces of a matrix.
        conclude: ``conclude(sums, buffers, given)`` makes of the sums for each matrix, float64,
            (width,) or (m, width), what the stage gets as ``given.whole``. It gets the buffers of
            rows and numbers only, and alone writes them.
        width: How many numbers.
        of_rows: Whether there are numbers for each row.
        of_input: Whether x alone is measured. Behind the map its owner then measures the whole
            result, so that nothing depends on how it is cut.
    """

    measure: Run
    conclude: Run
    width: int = 1
    of_rows: bool = False
    of_input: bool = True


class Stage(NamedTuple):
    """Elementwise work on the pieces of matrices that a rank holds.

    Attributes:
        run: ``run(x, buffers, given)`` gives a tensor for each of x, (rows, cols) each, and may
            return buffers themselves. It writes the buffers of entries, for each of which it gets a
            list aligned with x, and nothing else.
        buffers: What it keeps.
        needs: ``entries``: nothing but them; ``matrices``: whole matrices as x, which it only gets
            where every rank holds them whole (one process, DDP), and with which it may write
            buffers of rows; or a :class:`Statistic`.
        may_fail: Whether it may raise; see :class:`WholeMap`.
        counts: Whether it asks for ``given.steps``.
        may_refuse: Whether it may raise in the first two steps of a matrix, if only there.
    """

    run: Run
    buffers: tuple[Buffer, ...] = ()
    needs: Literal["entries", "matrices"] | Statistic = "entries"
    may_fail: bool = True
    counts: bool = False
    may_refuse: bool = False

    @property
    def statistic(self) -> Statistic | None:
        """What it must know of whole matrices."""
        return self.needs if isinstance(self.needs, Statistic) else None


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in more digits if it has them."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_dtype_of(x: Tensors, like: Tensors) -> Tensors:
    """Each tensor in the dtype of another of its shape.

    Lists with two dtypes take a call for each tensor, which costs an accelerator more than a copy
    of all in one.
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
    """‖x‖², a float64 number without a float64 copy of x; float32 where there is none."""
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
    """What is made of whole matrices by their owner.

    Attributes:
        run: ``run(X, polar, settings)`` gives a tensor of the shape of X, (m, n); ``polar(X)`` is
            the polar factor as the settings ask for it. Of pairs:
            ``run(weights, gradients, size, polar, settings)`` gives the changes of both factors.
        of_pairs: Whether it moves LoRA factors in pairs.
        balances: Whether the factors of a pair are brought to one norm now and then.
        replaces: Whether it is the polar factor: ``polar`` may then write over X, and X may be a
            batch (k, m, n), with transposes among them.
        decomposes: Whether it takes an SVD, for which X comes in full precision.
        may_fail: Whether it may raise for finite input. The step then keeps copies of what it
            writes, so that it is all or nothing.
    """

    run: Callable[..., Any]
    of_pairs: bool = False
    balances: bool = False
    replaces: bool = False
    decomposes: bool = False
    may_fail: bool = True


class Rule(NamedTuple):
    """An update rule; ``write`` is a stage that gets updates and changes ``given.weights``."""

    before: tuple[Stage, ...]
    whole: WholeMap
    after: tuple[Stage, ...]
    write: Stage

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those before the map and those after it."""
        return (*self.before, *self.after, self.write)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """What all stages keep."""
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
    """What a stage must know of matrices that are not cut, and whose parts are x."""
    statistic = stage.statistic
    if statistic is None:
        return []
    sums = [one.to(devices.widest(one.device)) for one in statistic.measure(x, buffers, given)]
    return statistic.conclude(sums, of_matrices(stage, buffers), given)


def of_matrices(stage: Stage, buffers: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
    """What a stage keeps of whole matrices, without what it keeps of their entries."""
    both = zip(stage.buffers, buffers, strict=True)
    return tuple(of_buffer for buffer, of_buffer in both if buffer.kind != "entries")
