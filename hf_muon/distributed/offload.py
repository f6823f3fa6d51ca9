"""Pieces that lie on the host while their matrices are computed on an accelerator.

In: blocks on one side. Out: the same on the other, in one copy for all of them through pinned
memory, from which an accelerator reads while the host goes on. torch holds on to pinned memory that
is freed until the copies from it are done, and gives it out again (its CachingHostAllocator, 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor


@contextmanager
def staged(places: Sequence[Tensor], here: torch.device) -> Iterator[Sequence[Tensor]]:
    """Where to write, on a device, what some places are to get when the block ends.

    Args:
        places: (rows, cols) each, of one dtype and device.
        here: Where what is written lies. The host does not wait for what it sends elsewhere.

    Yields:
        The places themselves, or memory of their shapes.
    """
    if not places or places[0].device.type == here.type:
        yield places
        return
    flat = _on_host(places)
    yield _blocks(flat, places)
    sent = flat.to(places[0].device, non_blocking=True)
    torch._foreach_copy_(list(places), _blocks(sent, places))


def fetched(blocks: list[Tensor], here: torch.device) -> list[Tensor]:
    """The blocks on a device; for what comes from elsewhere the host waits once.

    Args:
        blocks: (rows, cols) each, of one dtype and device.
        here: Where they are read.

    Returns:
        The blocks themselves, or copies.
    """
    if not blocks or blocks[0].device.type == here.type:
        return blocks
    there = blocks[0].new_empty(_numel(blocks))
    torch._foreach_copy_(_blocks(there, blocks), blocks)
    flat = _on_host(blocks)
    flat.copy_(there, non_blocking=True)
    if flat.is_pinned():
        copied = torch.Event(there.device)
        copied.record()
        copied.synchronize()
    return _blocks(flat, blocks)


def _on_host(blocks: Sequence[Tensor]) -> Tensor:
    pins = torch.accelerator.is_available()
    return torch.empty(_numel(blocks), dtype=blocks[0].dtype, device="cpu", pin_memory=pins)


def _numel(blocks: Sequence[Tensor]) -> int:
    return sum(block.numel() for block in blocks)


def _blocks(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat tensor, one after the other, of the shapes of some tensors."""
    ends = accumulate(one.numel() for one in like)
    return [
        flat[end - one.numel() : end].view(one.shape) for one, end in zip(like, ends, strict=True)
    ]
