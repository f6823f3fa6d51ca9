"""Pieces in host memory whose matrices are computed on an accelerator.

In: blocks on one side. Out: the same blocks on the other side, in one copy through pinned memory,
from which an accelerator can read while the host continues. torch reuses freed pinned memory only
after the copies from it are done (its CachingHostAllocator, 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor


@contextmanager
def staged(places: Sequence[Tensor], here: torch.device) -> Iterator[Sequence[Tensor]]:
    """Yield tensors to write on a device; when the block ends, they are copied to their places.

    Args:
        places: (rows, cols) each, of one dtype and device.
        here: The device that is written on. The host does not wait for copies to other devices.

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
    """Return the blocks on a device; the host waits once if they come from elsewhere.

    Args:
        blocks: (rows, cols) each, of one dtype and device.
        here: The device that they are read on.

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
    """Return consecutive views of a flat tensor, with the shapes of some tensors."""
    ends = accumulate(one.numel() for one in like)
    return [
        flat[end - one.numel() : end].view(one.shape) for one, end in zip(like, ends, strict=True)
    ]
