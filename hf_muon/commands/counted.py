"""Counts of the work for an accelerator: operations, launches, waits, arithmetic and bytes.

In: a block of code that works on meta tensors, which stand in for CUDA tensors, or on fake or real
CUDA tensors. Out: :class:`Counts`. Nothing is timed: operators are counted as torch dispatches
them, and the number of kernels for each is taken from torch's sources (2.13).

When the block reads a value from a stand-in, it gets ``True`` or 1, so that checks for finite
numbers pass. Two things are not counted: cuBLAS's own memory, and the copy for a tensor made from
Python numbers, for which the host of a real device would wait.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from hf_muon.optimizer.adamw import is_dense

HALF_PRECISION = (torch.bfloat16, torch.float16)
ALLOCATION = 512
"""Bytes: the caching allocator rounds each allocation up to a multiple of this."""

# torch's multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh) cuts the tensors of its lists
# into chunks. One launch takes at most this many chunks, and this many tensors per list, for 1 to 5
# lists. From CUDA 12.1 on, newer versions of torch take more of both: then these counts of launches
# are upper bounds.
CHUNK = 65536
MOST_CHUNKS = 320
MOST_TENSORS = (110, 64, 48, 36, 30)
MOST_TENSORS_WITH_SCALARS = (96, 64, 48, 36, 30)
MOST_CONCATENATED = 128

OWN_PRODUCT = "product"
"""The operator (A, B, C, beta, alpha, symmetric, out) of kernels that compute beta·C + alpha·AB in
one launch; they compute only half of a symmetric result."""

_ALLOCATING = ("empty", "new_empty")
_OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
_FUSED_PRODUCTS = {"addmm", "baddbmm", "addmm_", "baddbmm_"}
_PRODUCTS = {"mm", "bmm", *_FUSED_PRODUCTS}
# Operators whose results or errors the host reads.
_WAITING = {
    "nonzero", "masked_select", "_unique2", "equal", "_linalg_check_errors", "_linalg_svd",
    "_linalg_eigh",
}  # fmt: skip


class Work(NamedTuple):
    """The arithmetic and memory traffic of a kernel, or of one call on lists."""

    in_half: bool
    flop: int
    nbytes: int


@dataclass
class Counts:
    """The work that a block asked of the device.

    Attributes:
        operations: Calls of torch's operators with a tensor of the device, including views and
            allocations; each costs the host time.
        listed: Tensors in the lists of ``_foreach`` operators; each costs the host time, too.
        launches: Estimated number of kernels. A decomposition counts as one per matrix, which is
            too few. Copies between host and device do not count.
        waits: How often the host waits for the device.
        peak: Peak bytes of memory allocated in the block and not yet freed.
        work: How often each :class:`Work` occurred.
        by_name: Launches by name of the operator.
        waited: Waits by name of the operator.
    """

    operations: int = 0
    listed: int = 0
    launches: int = 0
    waits: int = 0
    peak: int = 0
    work: Counter[Work] = field(default_factory=Counter)
    by_name: Counter[str] = field(default_factory=Counter)
    waited: Counter[str] = field(default_factory=Counter)

    @property
    def flop(self) -> int:
        """Floating-point operations of matrix products."""
        return sum(work.flop * times for work, times in self.work.items())

    @property
    def nbytes(self) -> int:
        """Bytes read and written, counting each operand of a kernel once."""
        return sum(work.nbytes * times for work, times in self.work.items())

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of two blocks that run one after another."""
        return Counts(
            self.operations + other.operations,
            self.listed + other.listed,
            self.launches + other.launches,
            self.waits + other.waits,
            max(self.peak, other.peak),
            self.work + other.work,
            self.by_name + other.by_name,
            self.waited + other.waited,
        )


@contextmanager
def counting(device_type: str = "meta") -> Iterator[Counts]:
    """Count the work that a block asks of one type of device.

    Args:
        device_type: ``meta``, or ``cuda`` for fake and real CUDA tensors. Default: ``meta``.
    """
    mode = _Counting(device_type)
    with _lists_for_stand_ins(), mode:
        yield mode.counts


@contextmanager
def _lists_for_stand_ins() -> Iterator[None]:
    """Let torch use ``_foreach`` operators for stand-ins as for CUDA (private names of 2.13)."""
    names, utils = "_get_foreach_kernels_supported_devices", _foreach_utils
    kinds, types = getattr(utils, names), utils._foreach_supported_types
    setattr(utils, names, lambda: [*kinds(), "meta"])
    types.append(FakeTensor)
    try:
        yield
    finally:
        types.remove(FakeTensor)
        setattr(utils, names, kinds)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts each operator before it runs on the device or its stand-in."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counts()
        self._device_type = device_type
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._live = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "prim":  # reads the device of a fake tensor
            return func(*args, **kwargs)
        given = self._there([*args, *kwargs.values()])
        result = self._result(func, name, given, args, kwargs)
        made = self._there([result])
        if not (given or made):
            return result
        counts = self.counts
        counts.operations += 1
        counts.listed += sum(len(one) for one in args if isinstance(one, list | tuple))
        if waits := self._waits(name, args, kwargs, result):
            counts.waits += waits
            counts.waited[name] += waits
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
        for tensor in new:
            self._track(tensor.untyped_storage())
        if waits or name.startswith(_ALLOCATING) or not (new or _writes(func)):
            return result  # a copy between host and device, an allocation or a view
        launches, work = _asked(func, name, args, kwargs, result, new)
        counts.launches += launches
        counts.by_name[name] += launches
        counts.work.update(work)
        return result

    def _there(self, values: Iterable[Any]) -> list[Tensor]:
        return [one for one in _tensors(values) if one.device.type == self._device_type]

    def _result(
        self, func: Any, name: str, given: list[Tensor], args: Sequence[Any], kwargs: Any
    ) -> Any:
        """Run the operator; return a made-up value where a stand-in has no value."""
        if name == "_local_scalar_dense" and _stands_in(args[0]):
            constant = getattr(args[0], "constant", None)  # known for some fake tensors
            return _answer(args[0]) if constant is None else func(constant)
        if any(one.is_meta and not isinstance(one, FakeTensor) for one in given):
            if name == "_to_copy" and _to_host(kwargs.get("device")):
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.ones(args[0].shape, dtype=dtype, device="cpu")
            if name == "copy_" and _to_host(args[0].device):
                return args[0].fill_(1)
        return func(*args, **kwargs)

    def _waits(self, name: str, args: Sequence[Any], kwargs: Any, result: Any) -> int:
        if name == "_local_scalar_dense" or name in _WAITING:
            return 1
        if name in ("_to_copy", "copy_", "_foreach_copy_"):  # across devices
            source, target = (args[0], result) if name == "_to_copy" else (args[1], args[0])
            kinds = zip(_tensors([source]), _tensors([target]), strict=True)
            across = sum(a.device.type != b.device.type for a, b in kinds)
            free = kwargs.get("non_blocking") or (name != "_to_copy" and args[2:3] == (True,))
            return 0 if free else across
        return 0

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = ALLOCATION * math.ceil(storage.nbytes() / ALLOCATION)
        self._live += size
        self.counts.peak = max(self.counts.peak, self._live)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self._live -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _stands_in(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _answer(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _to_host(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _writes(func: Any) -> bool:
    return any(one.alias_info and one.alias_info.is_write for one in func._schema.arguments)


def _asked(
    func: Any, name: str, args: Sequence[Any], kwargs: Any, result: Any, new: Sequence[Tensor]
) -> tuple[int, list[Work]]:
    """Return the number of launches of an operator, and their work."""
    read, written = _touched(func, name, args, kwargs, new)
    moved = Work(False, 0, read + written)
    if name.startswith("_foreach"):
        return _of_lists(name, args, kwargs), [moved]
    if name.startswith("_fused_adam"):
        return launches_of([t.numel() for t in args[0]], lists=4), [moved]
    if name == OWN_PRODUCT and len(args) == 7:
        A, B, C, *_, symmetric, out = args
        flop = (1 if symmetric else 2) * A.numel() * B.shape[-1]
        nbytes = sum(_nbytes(one) for one in (A, B, C, out) if one is not None)
        return 1, [Work(A.dtype in HALF_PRECISION, flop, nbytes)]
    if name in _PRODUCTS:
        return _of_product(name, args, kwargs, result, read + written)
    if name in ("cat", "stack"):
        return math.ceil(len(args[0]) / MOST_CONCATENATED), [moved]
    if "linalg" in name and name != "linalg_vector_norm":
        return max(1, math.prod(args[0].shape[:-2])), [moved]
    has_entries = any(one.numel() for one in _tensors([result]))
    return int(has_entries), [moved] if has_entries else []


def _touched(
    func: Any, name: str, args: Sequence[Any], kwargs: Any, new: Sequence[Tensor]
) -> tuple[int, int]:
    """Return the bytes read and the bytes written."""
    read, written = 0, sum(map(_nbytes, new))
    if name.endswith("_like") or name.startswith("new_"):  # they read only the shape
        return read, written
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        size = sum(map(_nbytes, _tensors([value])))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        written += size * is_written
        is_only_written = argument.kwarg_only or (number == 0 and name in _OVERWRITING)
        read += size * (not (is_written and is_only_written))
    return read, written


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's entries; a broadcast dimension counts once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sides if stride) * tensor.element_size()


def _of_product(
    name: str, args: Sequence[Any], kwargs: Any, result: Tensor, nbytes: int
) -> tuple[int, list[Work]]:
    """Return the launches and work of a matrix product, with the copies around it.

    cuBLAS adds the product to the content of its result, so C is first copied there. Operands that
    are neither row-major nor column-major are copied, too.
    """
    fused = name in _FUSED_PRODUCTS
    A, B = args[1:3] if fused else args[:2]
    copies = [2 * _nbytes(one) for one in (A, B, result) if not _fits_blas(one)]
    in_place = result is args[0] or name.endswith("_")
    if fused and kwargs.get("beta", 1) != 0 and not in_place:
        copies.append(2 * _nbytes(result))
    flop = 2 * A.numel() * B.shape[-1]
    product = Work(A.dtype in HALF_PRECISION, flop, nbytes)
    return 1 + len(copies), [product, *(Work(False, 0, size) for size in copies)]


def _fits_blas(matrix: Tensor) -> bool:
    *_, rows, cols = matrix.shape
    *_, down, along = matrix.stride()
    by_row = (along == 1 or cols == 1) and (down >= max(1, cols) or rows == 1)
    return by_row or ((down == 1 or rows == 1) and (along >= max(1, rows) or cols == 1))


def _of_lists(name: str, args: Sequence[Any], kwargs: Any) -> int:
    """Return the launches of an operator on lists; one per tensor if the fast path does not apply.

    The fast path needs dense tensors of one dtype, each with the shape and strides of its
    counterparts in the other lists; a copy may convert from one dtype to another.
    """
    values = [*args, *kwargs.values()]
    given = [one for one in values if isinstance(one, list | tuple) and one]
    lists = [one for one in given if isinstance(one[0], Tensor)]
    if not lists:
        return 0
    is_copy = name.startswith("_foreach_copy")
    dtypes = [{tensor.dtype for tensor in one} for one in lists]
    alike = all(len(one) == 1 for one in dtypes) and (is_copy or len(set.union(*dtypes)) == 1)
    alike = alike and len({t.device for one in lists for t in one}) == 1
    rows = zip(*lists, strict=True)
    alike = alike and all(len({(t.shape, t.stride()) for t in row}) == 1 for row in rows)
    if not (alike and all(map(is_dense, lists[0]))):
        return len(lists[0])
    is_norm = name == "_foreach_norm"  # fills with zeros first, and sums over chunks at the end
    depth = len(lists) + (not name.endswith("_") and not is_norm)
    sizes = [tensor.numel() for tensor in lists[0]]
    return launches_of(sizes, depth, with_scalars=len(lists) < len(given)) + 2 * is_norm


def launches_of(sizes: Sequence[int], lists: int, *, with_scalars: bool = False) -> int:
    """Return the number of launches of ``multi_tensor_apply``.

    Args:
        sizes: Number of elements of each tensor of one list.
        lists: Number of lists, 1 to 5, including a list of results.
        with_scalars: Whether each tensor has its own scalar. Default: no.
    """
    table = MOST_TENSORS_WITH_SCALARS if with_scalars else MOST_TENSORS
    most = table[min(lists, len(table)) - 1]
    launches = tensors = chunks = 0
    for size in filter(None, sizes):
        tensors += 1
        left = math.ceil(size / CHUNK)
        while left:
            taken = min(left, MOST_CHUNKS - chunks)
            chunks, left = chunks + taken, left - taken
            if chunks == MOST_CHUNKS or (tensors == most and not left):
                launches += 1
                chunks, tensors = 0, int(left > 0)  # the next launch begins with the rest of it
    return launches + (chunks > 0)
