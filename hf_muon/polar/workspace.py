"""Memory for temporaries that one call after the other writes into.

In: a name, a shape, a dtype and a device. Out: a contiguous tensor of that shape, its content
undefined. Allocators give large blocks on CPUs back to the system and get them anew, page by page.
Accelerators have an allocator in torch that keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import devices


class Workspace:
    """Flat tensors by name and dtype, each as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(flat.nbytes for flat in self._flat.values())

    def empty(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the tensor of that name: the same memory at every call on a CPU."""
        if not devices.is_cpu(device):
            return torch.empty(*shape, dtype=dtype, device=device)
        numel = math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < numel:
            self._flat.pop((name, dtype), None)  # before the larger one takes its memory
            flat = self._flat[name, dtype] = torch.empty(numel, dtype=dtype, device=device)
        return flat[:numel].view(*shape)
