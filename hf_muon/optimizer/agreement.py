"""What the ranks must agree on before a step writes anything: one all-reduce.

In: the entries of all param groups, and any error in preparing the step. Out: the entries that have
a gradient on some rank; or an error on all ranks. One message covers missing gradients, unusable
gradients, and settings, of which ranks compare a hash; where it differs, they compare the settings.
At the first step, and whenever the tensors of some rank have changed (a load, a new group), they
also compare parameters, numbers of earlier steps, and the gradients of copies.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.distributed.find import agreed, is_dtensor, local, locals_of, sent_to
from hf_muon.distributed.layout import Ranks
from hf_muon.optimizer.auto_momentum import MOMENTA
from hf_muon.optimizer.copies import of_unequal_copies
from hf_muon.optimizer.entries import Entry
from hf_muon.optimizer.groups import STRUCTURE
from hf_muon.rules import rule_of

Facts = dict[str, Any]
"""What must be the same on all ranks, by a name that a user knows."""
Given = list[tuple[Entry, Tensor]]
"""The entries that have gradients on this rank, with them."""


class Agreement:
    """What the ranks that train together have agreed on so far."""

    def __init__(self) -> None:
        self._flags: dict[int, int] = {}  # by group: their number, which all ranks know to be equal
        self.forget()

    def forget(self) -> None:
        """Compare again before the next step."""
        # By the first entry of what was compared; weak, so as not to keep it alive.
        self._compared: WeakKeyDictionary[Entry, int] = WeakKeyDictionary()
        self._said_small = False

    def reach(
        self,
        groups: Sequence[Sequence[Entry]],
        members: Sequence[Ranks],
        replicate: Ranks,
        problem: Exception | None,
        facts: Callable[[], Facts],
    ) -> set[Entry]:
        """Return the entries that have a gradient on some rank.

        Args:
            groups: The entries of each group in this call.
            members: The groups of several ranks that must agree.
            replicate: The ranks that hold copies of the plain tensors.
            problem: The error that this rank met in preparing the step, if any.
            facts: Returns what else must be the same on all ranks; called when ranks compare.

        Raises:
            ValueError: Settings differ, or a gradient is sparse or complex.
            FloatingPointError: A gradient on some rank holds NaN or infinity, or is out of range.
        """
        entries = [entry for of_group in groups for entry in of_group]
        given = _given(entries)
        problem = problem or _of_wrong_kind(given)
        fine = [] if problem else _fine(groups, given, self._said_small)
        if not members:
            self._say(groups, [not one for one in _read(fine)])
            if problem is not None:
                raise problem
            return {entry for entry, _ in given}

        rank = _Rank(groups, members, entries[0].device, problem, fine)
        settings, key = _settings(groups), hash(tuple(entries))
        flags = [int(entry.tensor.grad is not None) for entry in entries]
        number = entries[0].group["group_id"]
        compares, known = int(self._compared.get(entries[0]) != key), self._flags.get(number)
        if known is not None:
            # A rank that has to compare, perhaps alone, sends as many flags as the others expect.
            said = [1, *[0] * known] if compares else [0, *flags]
            small, compares, *active = _told(rank, settings, said)
        if compares:
            _told(rank, settings if problem else {**settings, **facts()}, [])
            unequal = of_unequal_copies(entries, replicate, rank.device)
            if unequal is not None:
                rank = rank._replace(problem=unequal, fine=[])
            small, _, *active = _told(rank, settings, [0, *flags])
        self._say(groups, [False, bool(small)])
        self._compared[entries[0]], self._flags[number] = key, len(flags)
        return {entry for entry, flag in zip(entries, active, strict=True) if flag}

    def _say(self, groups: Sequence[Sequence[Entry]], doubts: Sequence[bool]) -> None:
        """Inspect the entries that a flag points to: raise for errors, and warn once."""
        bad, small = [*doubts, False, False][:2]
        problem = _problem(groups) if bad else None
        if problem is not None:
            raise problem
        if small:
            _say_too_small(groups)
            self._said_small = True


class _Rank(NamedTuple):
    """What a rank needs to talk to the others: its entries, its peers, its device, its problem."""

    groups: Sequence[Sequence[Entry]]
    members: Sequence[Ranks]
    device: torch.device
    problem: Exception | None
    fine: Sequence[Tensor]


def _number(said: Facts) -> tuple[int, int]:
    """Return a hash of the facts and its negative, so that one MAX shows whether ranks differ."""
    number = zlib.crc32(repr(said).encode()) >> 1
    return number, -number


def _told(rank: _Rank, said: Facts, flags: Sequence[int]) -> list[int]:
    """Return what is set on any rank: whether gradients are too small, and the flags.

    This waits for the device once: the device writes what only it knows into the message itself. If
    that leaves a doubt, which also happens when a norm overflows, all ranks inspect their gradients
    and report.

    Raises:
        Exception: On all ranks, if one has a problem or their facts differ.
    """
    sent = sent_to(rank.device, [_kind(rank.problem), 0, *_number(said), *flags])
    for place, one in enumerate(rank.fine):
        sent[place : place + 1] = one.logical_not()
    kind, small, most, least, *others = agreed(sent, rank.members).tolist()
    if kind:
        problem = rank.problem or _problem(rank.groups)
        if kind == _DOUBT:
            kind = agreed(sent_to(rank.device, [_kind(problem)]), rank.members).item()
        if kind:
            raise problem or _of_others(kind)
    if most != -least:
        raise _differences(said, rank.members)
    return [small, *others]


_DOUBT, _UNUSABLE, _OTHER = 1, 2, 3


def _kind(problem: Exception | None) -> int:
    if problem is None:
        return 0
    return _UNUSABLE if isinstance(problem, FloatingPointError) else _OTHER


def _of_others(kind: int) -> Exception:
    if kind == _UNUSABLE:
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
    """Return the error that stopped some rank's maps in a step, if any, on all ranks.

    This is a second wait for the device, but only for rules that may fail; by then their maps are
    done.
    """
    elsewhere = members and agreed(sent_to(device, [len(failures)]), members).item()
    if failures or not elsewhere:
        return failures[0] if failures else None
    return RuntimeError(
        "A matrix could not be mapped on another rank, whose error says why. No parameter and no "
        "state was changed."
    )


def _settings(groups: Sequence[Sequence[Entry]]) -> Facts:
    return {
        f"{key} of {group['algorithm']} group {group['group_id']}": value
        for group in (of_group[0].group for of_group in groups if of_group)
        for key, value in group.items()
        if key not in STRUCTURE
    }


def _differences(said: Facts, members: Sequence[Ranks]) -> ValueError:
    """Describe where the facts of ranks differ; all of them must call this."""
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
        "polar_dtype, and where the products do, a polar_kernel: 'auto' follows the hardware. No "
        "parameter and no state was changed."
    )


def _of_wrong_kind(given: Given) -> Exception | None:
    for entry, gradient in given:
        if gradient.layout is not torch.strided or gradient.is_complex():
            kind = "complex" if gradient.is_complex() else "sparse"
            return ValueError(
                f"The gradient of {entry.name} is {kind}; Muon and AdamW need dense real gradients "
                "(an embedding: sparse=False)."
            )
    return None


def _given(entries: Iterable[Entry]) -> Given:
    both = [(entry, entry.tensor.grad) for entry in entries]
    return [(entry, gradient) for entry, gradient in both if gradient is not None]


def _fine(groups: Sequence[Sequence[Entry]], given: Given, said_small: bool) -> list[Tensor]:
    """Return flags, (), that only the device knows, without waiting: whether gradients are usable.

    A norm of all gradients within the limits proves that every entry is. Where momentum is kept in
    float16, the second flag says whether none is too small for it.
    """
    norm = torch.nn.utils.get_total_norm(locals_of([gradient for _, gradient in given]))
    kinds = {(id(entry.group), entry.tensor.dtype): entry for entry, _ in given}
    fits = norm <= min(map(_limit, kinds.values()), default=math.inf)
    small = [] if said_small else [one.to(fits.device) for _, one in _too_small(groups)]
    return [fits, torch.stack(small).any().logical_not()] if small else [fits]


def _read(flags: Sequence[Tensor]) -> list[bool]:
    """Read the flags of a device, with one wait."""
    return torch.stack(list(flags)).tolist() if len(flags) > 1 else [bool(one) for one in flags]


def _problem(groups: Sequence[Sequence[Entry]]) -> Exception | None:
    """Return what is wrong with the gradients of this rank, if anything; inspects all of them."""
    given = _given(chain(*groups))
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


def _too_small(groups: Sequence[Sequence[Entry]]) -> list[tuple[str, Tensor]]:
    """Return which tensors keep momentum in float16, and whether it rounds their gradient away."""
    kept = [
        (entry, local(entry.tensor.grad))
        for of_group in groups
        if of_group and of_group[0].group.get("momentum_dtype") in ("float16", "parameter")
        for entry in of_group
        if entry.group["momentum_dtype"] == "float16" or entry.tensor.dtype == torch.float16
        if entry.tensor.grad is not None and local(entry.tensor.grad).numel()
    ]
    newest = [(e.name, _newest_share(e) * gradient.abs().max().float()) for e, gradient in kept]
    return [(name, (most > 0) & (most < 2**-25)) for name, most in newest]


def _say_too_small(groups: Sequence[Sequence[Entry]]) -> None:
    """Warn where momentum in float16 rounds a whole gradient away."""
    small = [name for name, is_small in _too_small(groups) if is_small]
    if small:  # empty if they are on another rank
        warnings.warn(
            f"The gradient is too small for momentum in float16, which stays zero, in "
            f"{_listed(small)}. Set momentum_dtype='bfloat16' or 'float32'.",
            stacklevel=7,
        )


_ALL_BAD = (
    " Every gradient holds it: clipping by a norm that is NaN makes all of them so, whichever was "
    "the first."
)


def _newest_share(entry: Entry) -> float:
    """The weight of a new gradient in the momentum; with several averages that of the quickest."""
    momentum = entry.group["momentum"]
    if momentum == "auto":
        return 1 - min(MOMENTA)
    return 1 - float(min(momentum) if isinstance(momentum, tuple) else momentum)


def _limit(entry: Entry) -> float:
    """The largest gradient for which nothing computed from it can overflow."""
    group, dtype = entry.group, entry.tensor.dtype
    if group["algorithm"] == "adamw":  # it keeps squares
        return math.sqrt(torch.finfo(dtype).max) / 2
    if group["momentum_dtype"] == "int8":  # computed in float32
        dtype = torch.float32
    elif group["momentum_dtype"] != "parameter":
        dtype = getattr(torch, group["momentum_dtype"])
    largest = torch.finfo(dtype).max / (4 if rule_of(group).buffers else 1)  # room for differences
    if group["matrix_map"] == "polargrad":  # a nuclear norm
        largest /= max(1, entry.tensor.numel())
    in_double = group["polar_method"] == "svd" and group["polar_dtype"] == "auto"
    if in_double or group["polar_dtype"] == "float64":
        return largest
    return min(largest, torch.finfo(torch.float32).max / (4 if dtype == torch.float64 else 1))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_placement(entry: Entry, buffer: Tensor | None = None) -> None:
    """Raise for a Muon parameter whose matrices cannot be found, or whose state is elsewhere.

    Checked whenever the tensors change, because launchers swap parameters for shards after the
    optimizer is built. The polar factor of a shard would be another algorithm.

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
