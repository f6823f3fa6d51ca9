"""Pieces in host memory whose matrices are computed on an accelerator.

In: blocks on one side. Out: the same blocks on the other side, in one copy through pinned memory,
from which an accelerator can read while the host continues. torch reuses freed pinned memory only
after the copies from it are done (its CachingHostAllocator, 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_muon.distributed.exchange import sections


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
    flat, shapes = _on_host(places), [place.shape for place in places]
    yield sections(flat, shapes)
    sent = flat.to(places[0].device, non_blocking=True)
    torch._foreach_copy_(list(places), sections(sent, shapes))


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
    flat, shapes = _on_host(blocks), [block.shape for block in blocks]
    there = blocks[0].new_empty(len(flat))
    torch._foreach_copy_(sections(there, shapes), blocks)
    flat.copy_(there, non_blocking=True)
    if flat.is_pinned():
        copied = torch.Event(there.device)
        copied.record()
        copied.synchronize()
    return sections(flat, shapes)


def _on_host(blocks: Sequence[Tensor]) -> Tensor:
    size, pins = sum(block.numel() for block in blocks), torch.accelerator.is_available()
    return torch.empty(size, dtype=blocks[0].dtype, device="cpu", pin_memory=pins)
