"""Gradients that a few bad ranks cannot spoil, in place of the mean over DDP's ranks.

In: the gradient buckets of a DistributedDataParallel. Out: entry by entry, the median of the ranks'
values, or their mean without the lowest and the highest; or the mean of the ranks that are closest
to others. Each entry is computed on one rank and sent to the others, so that all ranks have the
same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hf_muon.distributed.exchange import all_gather

METHODS = ("median", "trimmed_mean", "multi_krum")
# Up to this many ranks, pairwise comparisons of whole rows beat torch.sort along them: on one CPU
# core 5 times at 4 ranks, 3 times at 16.
_MOST_COMPARED = 16


@dataclass(eq=False)
class Robust:
    """What replaces the mean over ranks; the state of :func:`robust_hook`.

    Args:
        method: ``median``, ``trimmed_mean``, or ``multi_krum``.
        trim: How many to leave out: for a trimmed mean, of the lowest and of the highest values of
            an entry; for Multi-Krum, whole ranks. The median does not use it.
        group: The ranks; None is all.

    Attributes:
        not_finite: Flags (ranks,) for ranks whose gradients held NaN or infinity, in the share of
            the entries that this rank sees. None before the first bucket.

    Raises:
        ValueError: An unknown method, or ``trim`` is not a whole number ≥ 1.
    """

    method: str = "median"
    trim: int = 1
    group: dist.ProcessGroup | None = None
    not_finite: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise for wrong settings."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not one of {', '.join(METHODS)}.")
        if isinstance(self.trim, bool) or not isinstance(self.trim, int) or self.trim < 1:
            raise ValueError(f"trim={self.trim!r}: a whole number ≥ 1 is expected.")

    def left_out(self, ranks: int) -> int:
        """Return how many ranks are left out: at either end, or with Multi-Krum altogether.

        Raises:
            ValueError: There is only one rank, or too few would be left.
        """
        if ranks < 2:
            raise ValueError(
                "There is one process: a median over ranks has nothing to compare. Launch several "
                "under DDP, or leave robust aggregation out."
            )
        if self.method == "median":
            return (ranks - 1) // 2
        if self.method == "multi_krum":
            if ranks < (needed := 2 * self.trim + 2):
                raise ValueError(
                    f"method='multi_krum' with trim={self.trim} needs {needed} ranks or more, not "
                    f"{ranks}: among fewer, bad ranks that agree would look like the honest ones. "
                    "Lower trim, or use method='median'."
                )
            return self.trim
        if 2 * self.trim >= ranks:
            raise ValueError(
                f"trim={self.trim} leaves none of {ranks} ranks: less than half of them can be "
                "trimmed at either end. Lower it, or use method='median'."
            )
        return self.trim


def robust_mean(values: Tensor, method: str = "median", trim: int = 1) -> Tensor:
    """Return one value per entry from those of all ranks, which a few bad ranks cannot spoil.

    ``median`` and ``trimmed_mean`` go entry by entry. NaN counts as +∞. Let k ranks be left out at
    either end (for the median, all but the middle one or two). Then up to k arbitrary ranks cannot
    move the result beyond the values of the others. If more than k are NaN or infinite on one side,
    the result is infinite or NaN.

    ``multi_krum`` leaves out k = ``trim`` whole ranks, those with the largest sum of squared
    distances to their n − k − 2 nearest others, and returns the mean of the rest. Ranks with NaN or
    infinity are the first to go. The number of distances grows with the square of the ranks.

    Args:
        values: The ranks' values, (ranks, …), floating point.
        method: ``median`` (for an even number, the mean of the two middle ones), ``trimmed_mean``,
            or ``multi_krum``.
        trim: How many to leave out; the median does not use it.

    Returns:
        One value per entry, (…), in the dtype of ``values``; summed in float32 or better.

    Raises:
        ValueError: An unknown method, only one rank, or ``trim`` leaves too few.

    References:
        arXiv 1803.01498: median and trimmed mean tolerate a share of arbitrary ranks below one
        half. arXiv 1703.02757: Multi-Krum tolerates k of n ≥ 2k + 3 arbitrary ranks.
    """
    left_out = Robust(method, trim).left_out(len(values))
    if method == "multi_krum":
        rows = values.reshape(len(values), values[0].numel())
        return _mean_of_closest(values, _squared_distances(rows), left_out)
    return _mean_of_middle(values.clone(), left_out)


def robust_hook(state: Robust, bucket: Any) -> Future[Tensor]:
    """A communication hook of DDP: ``model.register_comm_hook(Robust("median"), robust_hook)``.

    An all-to-all brings each rank a share of the entries from all ranks; an all-gather returns the
    results. Together they send as much as a ring all-reduce, and need memory for one to two
    buckets, however many ranks there are (more in half precision, where sums are in float32).
    Multi-Krum also gathers the distances between ranks, and chooses for each bucket. The backward
    pass does not continue meanwhile.

    Args:
        state: What to compute.
        bucket: A ``GradBucket`` of DDP: gradients, summed over the micro-batches of this rank.

    Returns:
        The bucket, already reduced.
    """
    flat = bucket.buffer()
    done: Future[Tensor] = Future(devices=None if flat.device.type == "cpu" else [flat.device])
    done.set_result(_aggregate(flat, state))
    return done


# DDP compares annotations with its classes, but here they are strings (torch 2.9 to 2.13).
robust_hook.__annotations__.clear()


def make_robust(model: DistributedDataParallel, state: Robust) -> Robust:
    """Make a DDP model aggregate its gradients robustly from now on.

    Args:
        model: The wrapped model, before its first backward pass. If it has this hook already, the
            new state replaces the old one.
        state: What to compute; its group becomes the model's.

    Returns:
        The state that the model uses.

    Raises:
        TypeError: The model is not wrapped by DDP.
        ValueError: There is only one rank, or ``trim`` leaves too few.
        RuntimeError: The model has another communication hook.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"{type(model).__name__} is not wrapped by DistributedDataParallel: under FSDP2 and "
            "ZeRO the sum over ranks is already made where gradients are sharded, and no rank sees "
            "what the others had."
        )
    state.group = model.process_group
    state.left_out(dist.get_world_size(state.group))
    if (known := _STATES.get(model)) is not None:
        known.method, known.trim = state.method, state.trim
        return known
    try:
        model.register_comm_hook(state, robust_hook)
    except RuntimeError as error:
        raise RuntimeError(
            "The model has a communication hook already, and DDP takes one. Leave out "
            "ddp_comm_hook, or robust aggregation."
        ) from error
    _STATES[model] = state
    return state


_STATES: WeakKeyDictionary[DistributedDataParallel, Robust] = WeakKeyDictionary()


def _aggregate(flat: Tensor, state: Robust) -> Tensor:
    """Replace the entries by the aggregate over all ranks, in place."""
    ranks = dist.get_world_size(state.group)
    width = -(-flat.numel() // ranks)
    padded = flat
    if ranks * width > flat.numel():
        padded = torch.cat([flat, flat.new_zeros(ranks * width - flat.numel())])
    received = torch.empty(ranks, width, dtype=flat.dtype, device=flat.device)
    dist.all_to_all_single(received.view(-1), padded, group=state.group)
    bad = ~received.isfinite().all(1)
    state.not_finite = bad if state.not_finite is None else state.not_finite | bad
    left_out = state.left_out(ranks)
    if state.method == "multi_krum":
        shares = torch.empty(ranks * ranks, ranks, dtype=torch.float64, device=flat.device)
        all_gather(shares, _squared_distances(received), state.group)
        distances = shares.view(ranks, ranks, ranks).sum(0)  # in the same order on every rank
        result = _mean_of_closest(received, distances, left_out)
    else:
        result = _mean_of_middle(received, left_out)
    all_gather(padded, result, state.group)
    return flat if padded is flat else flat.copy_(padded[: flat.numel()])


def _mean_of_middle(values: Tensor, left_out: int) -> Tensor:
    """Return the mean over the first dimension without both ends; overwrites ``values``."""
    values.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    middle = _sorted(values)[left_out : len(values) - left_out]
    if len(middle) == 1:
        return middle[0]
    return middle.mean(0, dtype=_wide(values)).to(values.dtype)


def _mean_of_closest(values: Tensor, distances: Tensor, left_out: int) -> Tensor:
    """Return the mean of the ranks that are closest to others, given their squared distances."""
    is_bad = distances.diagonal().isnan()  # x − x is NaN for NaN and infinity alone
    to_others = distances.nan_to_num(nan=torch.inf, posinf=torch.inf).fill_diagonal_(-torch.inf)
    scores = to_others.sort(1).values[:, 1 : len(values) - left_out - 1].sum(1)
    order = scores.argsort(stable=True)
    order = order[is_bad[order].to(torch.uint8).argsort(stable=True)]
    kept = order[: len(values) - left_out].sort().values
    total = torch.zeros_like(values[0], dtype=_wide(values))
    for rank in kept[:, None]:  # one at a time, and without waiting for the device
        total += values.index_select(0, rank)[0]
    return total.div_(len(kept)).to(values.dtype)


def _squared_distances(values: Tensor) -> Tensor:
    """Return ‖vᵢ − vⱼ‖² between the rows, (ranks, ranks), in float64, where squares have room."""
    found = values.new_zeros(len(values), len(values), dtype=torch.float64)
    wide = _wide(values)
    for i, row in enumerate(values):
        one = row.to(wide)
        for j, other in enumerate(values[: i + 1]):
            found[i, j] = found[j, i] = (one - other.to(wide)).double().square_().sum()
    return found


def _wide(values: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32 or better."""
    return torch.promote_types(values.dtype, torch.float32)


def _sorted(values: Tensor) -> Tensor:
    """Sort over the first dimension; for few ranks in place, by odd-even transposition."""
    if len(values) > _MOST_COMPARED:
        return values.sort(0).values
    for turn in range(len(values)):
        for low, high in zip(values[turn % 2 : -1 : 2], values[turn % 2 + 1 :: 2], strict=True):
            lower = torch.minimum(low, high)
            torch.maximum(low, high, out=high)
            low.copy_(lower)
    return values
