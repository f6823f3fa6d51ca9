"""Which matrices a function of whole matrices gets together, and which one by one.

In: the shape of a matrix, the bytes of an element, the device. Out: yes or no. What a matrix gets
must not depend on what else its owner has, to the last bit: on CPUs batched kernels round like
those for one matrix within the bounds here and not beyond them.
"""

from __future__ import annotations

import torch

# Elements and rows, by the bytes of an element, from which a CPU orthogonalizes matrices one by
# one: a batch would be slower (scripts/bench/step.py --batching), and its symmetric products, which
# are not mirrored, would be rounded otherwise.
_CPU_ALONE = {2: (2**18, 384), 4: (2**16, 256), 8: (2**16, 256)}
# With fewer elements or rows a CPU rounds alike in batches of two or more, and otherwise in one.
_CPU_IN_TWOS = (2**14, 32)


def computed_together(shape: tuple[int, int], itemsize: int, device: torch.device) -> bool:
    """Whether matrices of a shape, and its transposes, go through a function together."""
    if device.type != "cpu":
        return True
    numel, rows = _CPU_ALONE[itemsize]
    return shape[0] * shape[1] < numel and min(shape) < rows


def rounds_alone(shape: tuple[int, int], device: torch.device) -> bool:
    """Whether a batch of one gets the bits that a larger one gets."""
    numel, rows = _CPU_IN_TWOS
    return device.type != "cpu" or (shape[0] * shape[1] > numel and min(shape) >= rows)
