"""What the ranks must agree on before a step writes anything: one all-reduce.

In: the entries of all param groups, and what went wrong in preparing the step. Out: the entries
that have a gradient on any rank; or an error on all of them. It is one message for the gradients
that exist, for those that cannot be used, and for settings: a number that follows from them is
compared at every step, and the settings themselves at the first one and where the numbers differ.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.find import agreed, compute_device, is_dtensor, local, locals_of
from hf_muon.distributed.layout import Ranks
from hf_muon.optimizer.auto_momentum import MOMENTA
from hf_muon.optimizer.entries import Entry
from hf_muon.optimizer.groups import STRUCTURE
from hf_muon.rules import rule_of

Facts = dict[str, Any]
"""What must be the same on all ranks, by a name that a user knows."""


class Agreement:
    """What ranks that train together have agreed on so far."""

    def __init__(self) -> None:
        # What was compared, by its first entry, which is not to be kept alive.
        self._compared: WeakKeyDictionary[Entry, int] = WeakKeyDictionary()
        self._said_small = False

    def reach(
        self,
        groups: Sequence[Sequence[Entry]],
        members: Sequence[Ranks],
        problem: Exception | None,
        facts: Callable[[], Facts],
    ) -> set[Entry]:
        """The entries that have a gradient on any rank.

        Args:
            groups: The entries of each group of this call.
            members: The groups of ranks that must agree.
            problem: What this rank could not prepare, if anything.
            facts: What must be the same on all ranks beside the settings; asked for once.

        Raises:
            ValueError: Settings differ, or a gradient is sparse or complex.
            FloatingPointError: A gradient holds NaN or infinity, or is out of range, on some rank.
        """
        entries = [entry for of_group in groups for entry in of_group]
        gradients = [entry.tensor.grad for entry in entries]
        members = [ranks for ranks in dict.fromkeys(members) if ranks.size > 1]
        problem = problem or _problem(groups)
        if not self._said_small and problem is None:
            self._said_small = _say_too_small(groups)
        if not members:
            if problem is not None:
                raise problem
            pairs = zip(entries, gradients, strict=True)
            return {entry for entry, gradient in pairs if gradient is not None}

        settings, device, key = _settings(groups), _device(entries), hash(tuple(entries))
        if self._compared.get(entries[0]) != key:
            # Before the first message whose length follows from what is compared.
            every = {**settings, **facts()}
            _raise_differences([_kind(problem), *_number(every)], every, problem, members, device)
        flags = [_kind(problem), *_number(settings), *(g is not None for g in gradients)]
        active = _raise_differences(flags, settings, problem, members, device)
        self._compared[entries[0]] = key
        return {entry for entry, flag in zip(entries, active, strict=True) if flag}


def _device(entries: Sequence[Entry]) -> torch.device:
    return compute_device(entries[0].tensor, entries[0].flat is not None)


def _number(said: Facts) -> tuple[int, int]:
    """A number that follows from facts, and its negative: of both the largest is asked for."""
    number = zlib.crc32(repr(said).encode()) >> 1
    return number, -number


def _raise_differences(
    flags: Sequence[int],
    said: Facts,
    problem: Exception | None,
    members: Sequence[Ranks],
    device: torch.device,
) -> list[int]:
    """The flags that are set on any rank; an error on all of them if they do not say the same."""
    sent = torch.tensor(flags, dtype=torch.int32, device=device)
    kind, most, least, *others = agreed(sent, members).tolist()
    if kind:
        raise problem or _of_others(kind)
    if most != -least:
        raise _differences(said, members)
    return others


def _kind(problem: Exception | None) -> int:
    return 0 if problem is None else 1 if isinstance(problem, FloatingPointError) else 2


def _of_others(kind: int) -> Exception:
    if kind == 1:
        return FloatingPointError(
            "Another rank has a gradient that cannot be used: NaN, infinite, or out of range. No "
            "parameter and no state was changed; that rank's error names the parameter."
        )
    return ValueError(
        "Another rank cannot step: its error says why. No parameter and no state was changed."
    )


def agree_on_failure(
    failures: Sequence[Exception], members: Sequence[Ranks], device: torch.device
) -> Exception | None:
    """What stopped some rank's maps in a step, known to all ranks; messages are on a device."""
    found = torch.tensor([len(failures)], dtype=torch.int32, device=device)
    others = [ranks for ranks in dict.fromkeys(members) if ranks.size > 1]
    if others and not agreed(found, others).item():
        return None
    if failures:
        return failures[0]
    if others:
        return RuntimeError(
            "A matrix could not be mapped on another rank, whose error says why. No parameter and "
            "no state was changed."
        )
    return None


def _settings(groups: Sequence[Sequence[Entry]]) -> Facts:
    return {
        f"{key} of {group['algorithm']} group {group['group_id']}": value
        for group in (of_group[0].group for of_group in groups if of_group)
        for key, value in group.items()
        if key not in STRUCTURE
    }


def _differences(said: Facts, members: Sequence[Ranks]) -> ValueError:
    """What ranks say that do not say the same; all of them must call."""
    found: dict[str, str] = {}
    for ranks in members:
        everyone: list[Any] = [None] * ranks.size
        dist.all_gather_object(everyone, said, group=ranks.group)
        for key in dict.fromkeys(chain.from_iterable(everyone)):
            values: dict[str, int] = {}
            for rank, one in zip(ranks.ranks, everyone, strict=True):
                values.setdefault(repr(one.get(key)), rank)
            if len(values) > 1:
                listed = ", ".join(f"{value[:80]} on rank {rank}" for value, rank in values.items())
                found[key] = f"{key}: {listed}"
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return ValueError(
        f"The ranks do not train the same: {'; '.join(list(found.values())[:4])}{more}. Give "
        "every rank the same model and settings; where the wire dtype differs, name a "
        "polar_dtype, since 'auto' follows the hardware. No parameter and no state was changed."
    )


def _problem(groups: Sequence[Sequence[Entry]]) -> Exception | None:
    """What is wrong with the gradients of this rank, if anything is.

    A norm of all gradients within the limits proves that every entry is, at the cost of one read; a
    norm that is not may also have overflowed, and only then are the entries looked at.
    """
    given = [
        (entry, entry.tensor.grad)
        for of_group in groups
        for entry in of_group
        if entry.tensor.grad is not None
    ]
    for entry, gradient in given:
        if gradient.layout is not torch.strided or gradient.is_complex():
            kind = "complex" if gradient.is_complex() else "sparse"
            return ValueError(
                f"The gradient of {entry.name} is {kind}; Muon and AdamW need dense real gradients "
                "(an embedding: sparse=False)."
            )
    norm = torch.nn.utils.get_total_norm(locals_of([gradient for _, gradient in given]))
    kinds = {(id(entry.group), entry.tensor.dtype): entry for entry, _ in given}
    if norm <= min(map(_limit, kinds.values()), default=math.inf):
        return None
    bad: list[str] = []
    large: list[str] = []
    for entry, gradient in given:
        for name, part in entry.parts(local(gradient)):
            most = float(part.abs().max()) if part.numel() else 0.0
            if not math.isfinite(most):
                bad.append(name)
            elif most > _limit(entry):
                large.append(f"{name} ({most:.2g}; {_limit(entry):.2g} is allowed)")
    if bad:
        return FloatingPointError(
            f"The gradient holds NaN or infinity in {_listed(bad)}. No parameter and no state was "
            "changed. Lower the learning rate, clip gradients (max_grad_norm), or look for a "
            "division by zero in the loss; under float16, train with a gradient scaler (fp16=True)."
            + (_ALL_BAD if len(bad) == len(given) > 1 else "")
        )
    if large:
        return FloatingPointError(
            f"The gradient is too large for what is kept of it in {_listed(large)}. No parameter "
            "and no state was changed. Clip gradients (max_grad_norm), or use a wider dtype: of "
            "weights, or for Muon momentum_dtype='float32'."
        )
    return None


def _say_too_small(groups: Sequence[Sequence[Entry]]) -> bool:
    """Warn where momentum in float16 rounds all of a gradient away; whether it did."""
    small = [
        entry.name
        for of_group in groups
        if of_group and of_group[0].group.get("momentum_dtype") in ("float16", "parameter")
        for entry in of_group
        if entry.group["momentum_dtype"] == "float16" or entry.tensor.dtype == torch.float16
        if entry.tensor.grad is not None and local(entry.tensor.grad).numel()
        if 0 < _newest_share(entry) * local(entry.tensor.grad).abs().max().float() < 2**-25
    ]
    if small:
        warnings.warn(
            f"The gradient is too small for momentum in float16, which stays zero, in "
            f"{_listed(small)}. Set momentum_dtype='bfloat16' or 'float32'.",
            stacklevel=4,
        )
    return bool(small)


_ALL_BAD = (
    " Every gradient holds it: clipping by a norm that is NaN makes all of them so, whichever was "
    "the first."
)


def _newest_share(entry: Entry) -> float:
    """What momentum takes of a new gradient; of several averages the quickest one's."""
    momentum = entry.group["momentum"]
    if momentum == "auto":
        return 1 - min(MOMENTA)
    return 1 - float(min(momentum) if isinstance(momentum, tuple) else momentum)


def _limit(entry: Entry) -> float:
    """The largest gradient with which nothing that is made of it can overflow."""
    group, dtype = entry.group, entry.tensor.dtype
    if group["algorithm"] == "adamw":  # which keeps squares
        return math.sqrt(torch.finfo(dtype).max) / 2
    if group["momentum_dtype"] == "int8":  # computed in float32
        dtype = torch.float32
    elif group["momentum_dtype"] != "parameter":
        dtype = getattr(torch, group["momentum_dtype"])
    largest = torch.finfo(dtype).max / (4 if rule_of(group).buffers else 1)  # differences, too
    if group["matrix_map"] == "polargrad":  # a nuclear norm
        largest /= max(1, entry.tensor.numel())
    in_double = group["polar_method"] == "svd" and group["polar_dtype"] == "auto"
    if in_double or group["polar_dtype"] == "float64":
        return largest
    return min(largest, torch.finfo(torch.float32).max / (4 if dtype == torch.float64 else 1))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_placement(entry: Entry, buffer: Tensor | None = None) -> None:
    """Raise for a Muon parameter whose matrices cannot be found, or whose state lies elsewhere.

    Launchers swap parameters for shards after the optimizer is built, so it is asked whenever they
    are others than before. A polar factor of a shard would be another algorithm.

    Raises:
        ValueError: Names the parameter and what to do.
    """
    if entry.flat is not None:
        return
    tensor, matrices = entry.tensor, entry.matrices
    expected = sum(matrix.numel for matrix in matrices)
    if tensor.numel() != expected and tensor.ndim >= 2:
        raise ValueError(
            f"{entry.name} has shape {tuple(tensor.shape)}, where matrices of {expected} elements "
            "in all are expected: it was resized after the optimizer was built. Build the "
            "optimizer afresh."
        )
    if tensor.ndim < 2:
        raise ValueError(
            f"{entry.name} is a flat shard: {type(tensor).__name__} of shape "
            f"{tuple(tensor.shape)}, where matrices of {expected} elements in all are expected. "
            "Muon trains whole tensors (one process, DDP), DTensors (FSDP2, tensor and expert "
            "parallelism) and the flat tensors of DeepSpeed ZeRO, not those of FSDP1: use FSDP2 "
            "(fsdp_version: 2)."
        )
    if len(matrices) > 1 and not local(tensor).is_contiguous():
        raise ValueError(
            f"{entry.name} is not contiguous in memory, so that its {len(matrices)} matrices are "
            "not where they are expected (channels_last, or a transposed view): make it contiguous "
            "before training."
        )
    if buffer is not None and is_dtensor(buffer) != is_dtensor(tensor):
        raise ValueError(
            f"The momentum of {entry.name} is a {type(buffer).__name__} and the parameter a "
            f"{type(tensor).__name__}: load optimizer state after the model is sharded, through "
            "torch.distributed.checkpoint."
        )
