"""Memory for temporaries that successive calls reuse.

In: a name, a shape, a dtype and a device. Out: a contiguous tensor of that shape, with undefined
content. CPU allocators return large blocks to the system and fetch them again page by page; on
accelerators torch's caching allocator keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import devices


class Workspace:
    """Flat tensors by name and dtype, each as large as the largest request for it."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(flat.nbytes for flat in self._flat.values())

    def empty(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the tensor of that name; on a CPU every call returns the same memory."""
        if not devices.is_cpu(device):
            return torch.empty(*shape, dtype=dtype, device=device)
        numel = math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < numel:
            self._flat.pop((name, dtype), None)  # free it before the larger one is allocated
            flat = self._flat[name, dtype] = torch.empty(numel, dtype=dtype, device=device)
        return flat[:numel].view(*shape)
