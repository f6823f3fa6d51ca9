"""Maps: functions of a whole matrix, computed by the rank that owns it.

In: a filtered matrix X = UΣVᵀ, (m, n), and a function that returns its polar factor O with the
group's settings. Out: a matrix of the same shape and singular vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_muon.polar import in_own_dtype
from hf_muon.rules import MAPS
from hf_muon.stages import WholeMap, wide

Polar = Callable[..., Tensor]
Settings = Mapping[str, Any]


def polar_factor_of(X: Tensor, polar: Polar, settings: Settings) -> Tensor:
    """O(X) = UVᵀ."""
    return polar(X)


def polargrad(X: Tensor, polar: Polar, settings: Settings) -> Tensor:
    """⟨X, O⟩·O: the polar factor of X times its nuclear norm (arXiv 2505.21799)."""
    O = polar(X)  # noqa: E741
    nuclear_norm: Tensor = torch.sum(wide(X) * wide(O))
    if O.dtype == torch.float16:  # it holds polar factors, but not their multiples
        O = wide(O)  # noqa: E741
    return O * nuclear_norm.to(O.dtype)


def soft(X: Tensor, polar: Polar, settings: Settings) -> Tensor:
    """U(Σ/σ₁)ᵖVᵀ, p = ``map_power``: the polar factor for p = 0, near 1 the matrix itself."""
    U, S, Vh = torch.linalg.svd(wide(X), full_matrices=False)
    kept = max(X.shape) * torch.finfo(S.dtype).eps * S[:1] < S  # as in the exact polar factor
    shares = torch.where(kept, S / S[:1], 1.0) ** settings["map_power"]
    with in_own_dtype(X.device.type):
        found: Tensor = (U * (shares * kept)) @ Vh
    return found.to(X.dtype)


MAPS["polar"] = WholeMap(polar_factor_of, replaces=True, may_fail=False)
MAPS["polargrad"] = WholeMap(polargrad, may_fail=False)
MAPS["soft"] = WholeMap(soft, decomposes=True)
