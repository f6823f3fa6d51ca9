"""The maps: what is made of a whole matrix, by its owner.

In: a matrix X = UΣVᵀ, (m, n), filtered, and the polar factor O as the settings ask for it. Out: one
of the same singular vectors and shape.
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
    """⟨X, O⟩·O, the nuclear norm of X times its polar factor (arXiv 2505.21799)."""
    O = polar(X)  # noqa: E741
    nuclear_norm: Tensor = torch.sum(wide(X) * wide(O))
    if O.dtype == torch.float16:  # which holds polar factors, and not their multiples
        O = wide(O)  # noqa: E741
    return O * nuclear_norm.to(O.dtype)


def soft(X: Tensor, polar: Polar, settings: Settings) -> Tensor:
    """U(Σ/σ₁)ᵖVᵀ, p = ``map_power``: the polar factor at 0, and near 1 the matrix itself."""
    wide = torch.promote_types(X.dtype, torch.float32)
    U, S, Vh = torch.linalg.svd(X.to(wide), full_matrices=False)
    kept = max(X.shape) * torch.finfo(wide).eps * S[:1] < S  # as in the exact polar factor
    shares = torch.where(kept, S / S[:1], 1.0) ** settings["map_power"]
    with in_own_dtype(X.device.type):
        found: Tensor = (U * (shares * kept)) @ Vh
    return found.to(X.dtype)


MAPS["polar"] = WholeMap(polar_factor_of, replaces=True, may_fail=False)
MAPS["polargrad"] = WholeMap(polargrad, may_fail=False)
MAPS["soft"] = WholeMap(soft, decomposes=True)
