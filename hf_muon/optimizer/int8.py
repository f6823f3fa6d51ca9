"""Numbers in one byte: blocks of a matrix's rows, each scaled by its largest entry.

In: entries of a matrix, or of a piece of it. Out: q = round(127·x/‖x‖∞) of each block, and back; an
entry is off by at most ‖x‖∞/254. Blocks are cut from whole rows, wherever a rank's piece begins and
ends, so that results do not depend on the sharding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_muon.stages import BLOCK, blocks_in


def _cuts(first: int, cols: int) -> Iterator[tuple[int, slice]]:
    """Yield each block that columns from ``first`` on belong to, with its slice of the piece."""
    for block in range(first // BLOCK, blocks_in(first + cols)):
        yield block, slice(max(0, block * BLOCK - first), min(cols, (block + 1) * BLOCK - first))


def decoded(q: Tensor, largest: Tensor, first: int) -> Tensor:
    """Return the entries of a piece, float32.

    Args:
        q: (rows, cols), int8.
        largest: ‖x‖∞ of the blocks of its rows, (rows, blocks of the whole row).
        first: The piece's first column in the matrix.
    """
    x = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for block, cut in _cuts(first, q.shape[1]):
        torch.mul(q[:, cut], largest[:, block, None] / 127, out=x[:, cut])
    return x


def encode(x: Tensor, q: Tensor, largest: Tensor, first: int) -> None:
    """Write q, the inverse of :func:`decoded`; ``largest`` must cover all pieces of a block."""
    for block, cut in _cuts(first, q.shape[1]):
        size = largest[:, block, None]
        shares = torch.where(size > 0, x[:, cut] * (127 / size), 0.0)
        q[:, cut] = shares.round_().clamp_(-127, 127).to(torch.int8)


def add_largest(x: Tensor, largest: Tensor, first: int) -> None:
    """Raise ``largest`` to the largest entries of a piece (rows, cols), block by block."""
    for block, cut in _cuts(first, x.shape[1]):
        found = torch.linalg.vector_norm(x[:, cut], float("inf"), dim=1)
        torch.maximum(largest[:, block], found.to(largest.device), out=largest[:, block])
