"""An accelerator that is not there, with real numbers: what would cross to it and back is counted.

In: a ``with`` block, in which the device ``meta`` computes. Out: the same numbers as on a CPU, and
a record of what crossed between the devices. Operands on both devices raise, as they would there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_CPU = torch.device("cpu")


class There(Tensor):
    """A tensor that says it is on the device ``meta``, and holds numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        """Wrap a tensor of the CPU."""
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=DEVICE, **place
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"There({self.inner})"

    def tolist(self) -> Any:  # torch's refuses subclasses
        """The numbers, as ``Tensor.tolist``."""
        CROSSED.append(Crossing("waits", 1))
        return self.inner.tolist()

    def new_tensor(self, data: Any, **how: Any) -> There:  # torch's makes an empty one
        """Numbers of the host on the device, as ``Tensor.new_tensor``."""
        return There(self.inner.new_tensor(data, **how))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, frozenset())


@dataclass(frozen=True)
class Crossing:
    """A copy ``there`` or ``back``, or a number that the host ``waits`` for."""

    way: str
    numel: int
    blocks: bool = True


CROSSED: list[Crossing] = []


@dataclass
class _Device(TorchDispatchMode):
    lacks: frozenset[torch.dtype] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.lacks)


@contextmanager
def elsewhere(*lacks: torch.dtype) -> Iterator[list[Crossing]]:
    """Let the device ``meta`` compute, but in no dtype that it ``lacks``."""
    CROSSED.clear()
    with _Device(frozenset(lacks)):
        yield CROSSED


def _run(func: Any, args: Any, kwargs: Any, lacks: frozenset[torch.dtype]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = any(isinstance(t, There) for t in tensors)
    crosses = name in ("_to_copy", "copy_", "_foreach_copy_")
    if there and not crosses and any(t.ndim for t in tensors if not isinstance(t, There)):
        raise RuntimeError(f"{name} got tensors on two devices: {[t.device for t in tensors]}")
    if name == "_local_scalar_dense" and there:
        CROSSED.append(Crossing("waits", 1))
    device = kwargs.get("device")
    inner = {**kwargs, "device": _CPU} if device is not None else kwargs
    out = func(*tree_map(_inner, args), **tree_map(_inner, inner))
    lands = there if device is None else torch.device(device) == DEVICE
    if crosses:
        _note(name, args, kwargs, lands)
    if func._schema.is_mutable:
        written = kwargs.get("out", args[0] if args else None)
        _refuse(name, [t for t in tree_leaves(written) if isinstance(t, There)], lacks)
        return written if out is not None else None
    if lands:
        out = tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, out)
        _refuse(name, [t for t in tree_leaves(out) if isinstance(t, There)], lacks)
    return out


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, There) else value


def _note(name: str, args: Any, kwargs: Any, lands: bool) -> None:
    if name == "_to_copy":
        pairs, blocks = [(lands, args[0])], not kwargs.get("non_blocking")
    else:
        into, source = (args[0], args[1]) if name == "_foreach_copy_" else ([args[0]], [args[1]])
        pairs = [(isinstance(a, There), b) for a, b in zip(into, source, strict=True)]
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    for there, source in pairs:
        if there != isinstance(source, There):
            CROSSED.append(Crossing("there" if there else "back", source.numel(), blocks))


def _refuse(name: str, found: list[There], lacks: frozenset[torch.dtype]) -> None:
    for tensor in found:
        if tensor.dtype in lacks:
            raise TypeError(f"{name} gives {tensor.dtype}, which the device does not have.")
