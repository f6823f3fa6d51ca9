"""Rescalings of updates, behind polar factor and filter.

In: updates in lists, and what a stage is told. Out: updates of another size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_muon.rules import RESCALES, Given, Stage


def frobenius(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """U·√min(m, n)/‖U‖_F: the RMS of a polar factor, 1/√max(m, n). Zero stays zero."""
    factors = (
        torch.where(norm > 0, min(shape) ** 0.5 / norm, 0.0)
        for shape, norm in zip(given.shapes, given.norms, strict=True)
    )
    return [u * factor.to(u) for u, factor in zip(x, factors, strict=True)]


RESCALES["frobenius"] = (Stage(frobenius, needs="norms"),)
