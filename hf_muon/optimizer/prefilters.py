"""Prefilters: what happens to gradients first, against heavy tails and single spikes.

In: pieces of gradients. Out: the same without entries that would dominate an average for a whole
window. An average of gradients with infinite variance is dominated by single entries (arXiv
2606.03899), and one gradient a thousand times too large stays in it for thousands of steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_muon.polar import devices
from hf_muon.rules import PREFILTERS
from hf_muon.stages import NORMS, Buffer, Given, Stage, Statistic, wide

# How much the logarithm of the running median changes if no entry, or every entry, is above it.
_RATE = 0.1


def clip(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Clip entries at ± ``prefilter_threshold`` times the running median of abs(G)."""
    limit = given.settings["prefilter_threshold"]
    bounds = (limit * median.to(one.dtype) for one, median in zip(x, given.whole, strict=True))
    return [torch.clamp(one, -b, b) for one, b in zip(x, bounds, strict=True)]


def _counts(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Return how many entries exceed the median so far, how many are nonzero, and their sum."""
    found = []
    for one, median in zip(x, buffers[0], strict=True):
        size = one.abs()
        above, some = (size > median.to(size)).sum(), size.count_nonzero()
        found.append(torch.stack([above, some, size.sum(dtype=devices.widest(one.device))]))
    return found


def _median(sums: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Update the running median s ← s·exp(r·(2p − 1)), where p is the share of entries above s.

    It is stationary at p = ½. Counts do not depend on the sharding, and no single entry, however
    large, changes s by more than a factor e^r. Zero entries do not count: they belong to weights
    that the gradient does not reach, and say nothing of its scale. s begins at the median that
    normally distributed entries with the same mean absolute value have.
    """
    [medians] = buffers
    for (above, some, total), median in zip(sums, medians, strict=True):
        share, mean = above / some.clamp(min=1), total / some.clamp(min=1)
        moved = median.to(total.dtype) * torch.exp(_RATE * (2 * share - 1))
        found = torch.where(median > 0, moved, _MEDIAN_OF_NORMAL * mean)
        median.copy_(torch.where(some > 0, found, median))
    return medians


_MEDIAN_OF_NORMAL = 0.67448975 / math.sqrt(2 / math.pi)  # median over mean of abs(N(0, 1))


def norm(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """G/‖G‖_F of the whole matrix, so that each step has the same weight. Zero stays zero."""
    found = []
    for one, size in zip(x, given.whole, strict=True):
        numbers = wide(one)
        divisor = size.to(numbers.dtype)
        found.append(torch.where(divisor > 0, numbers / divisor, 0.0).to(one.dtype))
    return found


PREFILTERS["clip"] = (
    Stage(
        clip,
        (Buffer("median", "numbers"),),
        Statistic(_counts, _median, width=3, of_input=False),
        may_fail=False,
    ),
)
PREFILTERS["norm"] = (Stage(norm, needs=NORMS, may_fail=False),)
