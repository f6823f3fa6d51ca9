"""Products and norms by Triton: symmetric products by halves, the same bits in any batch.

In: CUDA matrices (…, m, n) with at most one batch dimension, of any strides, in bfloat16, float16
or float32. Out: their products, summed in float32 and rounded once. Imported on demand, because
triton is optional. The launches are torch operators (``hf_muon::product``,
``hf_muon::chunk_sums``), so that tensors without memory can pass through them.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .products import Products
from .triton_kernels import chunk_sum, product

INTERPRETED = not isinstance(product, triton.JITFunction)
"""Whether the kernels run on a CPU, slowly: ``TRITON_INTERPRET=1`` was set before the import."""
ROUNDS, BLOCK = 8, 2048
"""A program adds up this many times this many entries."""


class Blocks(NamedTuple):
    """How a product is tiled: tiles of rows × cols, summed over depth entries at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


SMALL_SIDE = 512
"""Up to it, tiles of 128 × 128 would be fewer than a device has processors."""


def blocks_for(
    sizes: tuple[int, int, int], dtype: torch.dtype, symmetric: bool, shared: int
) -> Blocks:
    """Return blocks that depend only on the matrix and the device: there is no autotuning.

    Args:
        sizes: rows and columns of the result, and the length of the inner dimension.
        dtype: of the matrices.
        symmetric: whether tiles are mirrored, and must therefore be square.
        shared: bytes of shared memory that a program may use.
    """
    # Rows with unaligned starts are loaded entry by entry, which takes registers.
    if dtype == torch.float32 or any(size % 16 for size in sizes):
        return Blocks(64, 64, 32, 4, 3)
    if min(sizes[:2]) <= SMALL_SIDE:
        return Blocks(64, 64, 64, 4, 4)
    if shared < 160 * 1024:  # 8.6, 8.9 and 12.x have 99 KiB, 8.0 has 163 and 9.0 has 227
        return Blocks(128, 128, 32, 8, 4)
    return Blocks(128, 128, 64, 8, 4) if symmetric else Blocks(128, 256, 64, 8, 3)


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _launch_product(
    A: Tensor, B: Tensor, C: Tensor | None, beta: float, alpha: float, symmetric: bool, out: Tensor
) -> None:
    M, N, K = *out.shape[-2:], A.shape[-1]
    a, b, d = (X if X.ndim == 3 else X[None] for X in (A, B, out))
    c = d if C is None else C if C.ndim == 3 else C[None]
    blocks = blocks_for((M, N, K), A.dtype, symmetric, _shared_memory(out.device))
    rows, cols = triton.cdiv(M, blocks.rows), triton.cdiv(N, blocks.cols)
    tiles = rows * (rows + 1) // 2 if symmetric else rows * cols
    if out.numel() == 0:
        return
    with _on(out.device):
        product[(tiles * d.shape[0],)](
            a, b, c, d, M, N, K, tiles, float(beta), float(alpha),
            *a.stride(), *b.stride(), *c.stride(), *d.stride(),
            HAS_C=C is not None, SYMMETRIC=symmetric, EVEN_K=K % blocks.depth == 0,
            UPCAST=INTERPRETED, BM=blocks.rows, BN=blocks.cols, BK=blocks.depth, GROUP=8,
            num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _launch_sums(X: Tensor, of_squares: bool, out: Tensor) -> None:
    if out.numel() == 0:
        return
    with _on(out.device):
        chunk_sum[(out.numel(),)](
            X, out, X.shape[1], out.shape[1],
            OF_SQUARES=of_squares, ROUNDS=ROUNDS, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


_library: Any = torch.library.Library
_OPERATORS = _library("hf_muon", "DEF")


def _define(schema: str, launch: Any) -> None:
    name = schema.partition("(")[0]
    _OPERATORS.define(schema)
    for key in ("CUDA", "CPU"):  # the interpreter works on a CPU
        _OPERATORS.impl(name, launch, key)
    _OPERATORS.impl(name, lambda *_: None, "Meta")


_define(
    "product(Tensor A, Tensor B, Tensor? C, float beta, float alpha, bool symmetric, "
    "Tensor(a!) out) -> ()",
    _launch_product,
)
_define("chunk_sums(Tensor X, bool of_squares, Tensor(a!) out) -> ()", _launch_sums)


def _product(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    beta: float = 0.0,
    alpha: float = 1.0,
    out: Tensor,
    symmetric: bool = False,
) -> Tensor:
    """The ``Product``; a symmetric one computes one half and mirrors it, exactly."""
    torch.ops.hf_muon.product(A, B, C, beta, alpha, symmetric, out)
    return out


def norm(X: Tensor) -> Tensor:  # (m, n) -> (), (k, m, n) -> (k, 1, 1)
    """The Frobenius norms of contiguous matrices: sums of chunks, then sums of those sums."""
    shape = X.shape[:-2] and (len(X), 1, 1)
    sums, of_squares = X.reshape(shape[0] if shape else 1, -1), True
    while of_squares or sums.shape[1] > 1:
        chunks = math.ceil(sums.shape[1] / (ROUNDS * BLOCK))
        found = sums.new_empty(len(sums), chunks, dtype=torch.float32)
        torch.ops.hf_muon.chunk_sums(sums, of_squares, found)
        sums, of_squares = found, False
    dtype = torch.float32 if X.dtype == torch.float16 else X.dtype
    return sums.sqrt_().to(dtype).view(shape)


TRITON = Products("triton", _product, partial(_product, symmetric=True), norm, is_fixed=True)
"""Products and norms by Triton."""
