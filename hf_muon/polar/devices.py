"""What kind of device works best in which way: small pieces and one by one, or in few large calls.

In: a device, or a tensor. Out: yes or no, or a dtype. Asked as ``devices.is_cpu(…)`` wherever the
way of working follows from the device: one place decides, and a test can take the other way with
real numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def is_cpu(device: torch.device) -> bool:
    """Whether work is cut into what a CPU's cache holds, and large matrices come one by one.

    Elsewhere each call costs a launch, so that it serves as many tensors as memory allows.
    """
    return device.type == "cpu"


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has no memory behind it, only a shape, a dtype and a device."""
    return x.is_meta or isinstance(x, FakeTensor)


def widest(device: torch.device) -> torch.dtype:
    """The dtype with the most digits that a device computes in: float64, which MPS does not have.

    For sums over whole matrices, and for what is squared before it is inverted.
    """
    return torch.float32 if device.type == "mps" else torch.float64
