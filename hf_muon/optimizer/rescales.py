"""Rescalings of the update after the polar factor.

In: pieces of updates U, and statistics of the whole updates. Out: updates with the same direction,
or with other proportions between rows (NorMuon) or entries (AdaMuon).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_muon.polar import alike, devices
from hf_muon.rules import RESCALES
from hf_muon.stages import NORMS, Buffer, Given, Stage, Statistic, square_norm, wide

_EPS = 1e-8


def frobenius(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """U·√min(m, n)/‖U‖_F: the RMS of a polar factor, 1/√max(m, n). Zero stays zero."""
    factors: dict[int, Tensor] = {}
    for (m, n), places in alike(given.shapes).items():
        norms = torch.stack([given.norms[place] for place in places])
        of_shape = torch.where(norms > 0, min(m, n) ** 0.5 / norms, 0.0).to(x[0].dtype)
        factors.update(zip(places, of_shape.unbind(), strict=True))
    return [u * factors[place] for place, u in enumerate(x)]


def times(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Multiply each update by its statistic, a number for each of its rows, in float32."""
    return [u * factor.to(u) for u, factor in zip(map(wide, x), given.whole, strict=True)]


def _row_squares(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    dtype = devices.widest(x[0].device)
    norms = (torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=dtype) for u in x)
    return [norm.square() for norm in norms]


def _row_factors(
    sums: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given
) -> list[Tensor]:
    """NorMuon (arXiv 2510.05491): v ← β₂v + (1−β₂)·(mean of U² over columns).

    Divides each row of U by √v + ε, then scales the whole update back to ‖U‖_F.
    """
    found = []
    for squares, average, (_, cols) in zip(sums, buffers[0], given.shapes, strict=True):
        average.lerp_((squares / cols).to(average), 1 - given.settings["rescale_beta"])
        factors = 1 / (average.to(squares.dtype).sqrt() + _EPS)
        found.append(factors * _ratio(squares.sum(), (squares * factors.square()).sum()))
    return found


def entries(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """AdaMuon (arXiv 2507.11005): V ← β₂V + (1−β₂)U²; U/(√V̂ + ε), scaled back to ‖U‖_F.

    V̂ = V/(1 − β₂ᵗ) in step t.
    """
    [averages] = buffers
    beta = given.settings["rescale_beta"]
    for u, average in zip(x, averages, strict=True):
        average.lerp_(u.to(average).square(), 1 - beta)
    divided = _divided(x, averages, given)
    return [u * ratio.to(u) for u, ratio in zip(divided, given.whole, strict=True)]


def _divided(x: list[Tensor], averages: list[Tensor], given: Given) -> list[Tensor]:
    beta = given.settings["rescale_beta"]
    return [
        u.to(average) / ((average / (1 - beta**step)).sqrt() + _EPS)
        for u, average, step in zip(x, averages, given.steps, strict=True)
    ]


def _both_squares(x: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    """Return ‖U‖² before and after the division by this step's averages."""
    [averages] = buffers
    beta = given.settings["rescale_beta"]
    coming = [
        torch.lerp(average, u.to(average).square(), 1 - beta)
        for u, average in zip(x, averages, strict=True)
    ]
    divided = _divided(x, coming, given)
    return [torch.stack(list(map(square_norm, pair))) for pair in zip(x, divided, strict=True)]


def _ratios(sums: list[Tensor], buffers: tuple[list[Tensor], ...], given: Given) -> list[Tensor]:
    return [_ratio(*both) for both in sums]


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """Return the number that restores a matrix's norm, from the squares of both norms."""
    return torch.where(after > 0, (before / after).sqrt(), 0.0)


RESCALES["frobenius"] = (Stage(frobenius, needs=NORMS, may_fail=False),)
RESCALES["rows"] = (
    Stage(
        times,
        (Buffer("row_avg_sq", "rows", squares=True),),
        Statistic(_row_squares, _row_factors, of_rows=True),
        may_fail=False,
    ),
)
RESCALES["entries"] = (
    Stage(
        entries,
        (Buffer("exp_avg_sq", dtype=torch.float32, squares=True),),
        Statistic(_both_squares, _ratios, width=2, of_input=False),
        may_fail=False,
        counts=True,
    ),
)
