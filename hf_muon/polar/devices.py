"""What suits a device: small pieces one by one, or a few large calls.

In: a device, or a tensor. Out: yes or no, or a dtype. Always call it as ``devices.is_cpu(…)``: one
place decides, and a test can patch it to take the accelerator's way with real numbers on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def is_cpu(device: torch.device) -> bool:
    """Whether work is cut into pieces that fit a CPU's cache, and large matrices go one by one.

    On other devices each call costs a launch, so one call serves as many tensors as memory allows.
    """
    return device.type == "cpu"


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has no memory behind it, only a shape, a dtype and a device."""
    return x.is_meta or isinstance(x, FakeTensor)


def widest(device: torch.device) -> torch.dtype:
    """Return the most precise dtype a device computes in: float64, except on MPS, which has none.

    Used for sums over whole matrices, and for Gram matrices that are then inverted.
    """
    return torch.float32 if device.type == "mps" else torch.float64
