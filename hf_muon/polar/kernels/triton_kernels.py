"""Two Triton kernels: a matrix product, and sums over chunks of matrices.

In: pointers, sizes and strides, in numbers of elements. Out: one tile of a product, or one sum, per
program. The order of additions depends only on sizes and blocks, so a matrix gets the same result
whatever else is in its batch.
"""

import triton
import triton.language as tl


@triton.jit
def product(
    A, B, C, D,
    M, N, K, tiles, beta, alpha,
    ab, am, ak, bb, bk, bn, cb, cm, cn, db, dm, dn,
    HAS_C: tl.constexpr, SYMMETRIC: tl.constexpr, EVEN_K: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write a tile of D = beta·C + alpha·AB; if D is symmetric, also the tile's mirror image."""
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.cdiv(M, BM)
    if SYMMETRIC:
        # T(T + 1)/2 tiles at and below the diagonal: row h + i, h = ⌊T/2⌋, and row h − 1 − i fill
        # a line of a rectangle that is as wide as T, or as T + 1 for even T.
        half = rows // 2
        line, place = tile // (2 * half + 1), tile % (2 * half + 1)
        is_first = place <= half + line
        row = tl.where(is_first, half + line, half - 1 - line)
        col = tl.where(is_first, place, place - half - line - 1)
    else:
        # Neighbors share rows and columns: they go down GROUP tiles, then one to the right.
        cols = tl.cdiv(N, BN)
        first = tile // (GROUP * cols) * GROUP
        height = tl.minimum(rows - first, GROUP)
        row = first + tile % (GROUP * cols) % height
        col = tile % (GROUP * cols) // height
    at_m = (row * BM + tl.arange(0, BM)).to(tl.int64)
    at_n = (col * BN + tl.arange(0, BN)).to(tl.int64)
    at_k = tl.arange(0, BK).to(tl.int64)
    in_m, in_n = at_m < M, at_n < N
    a = A + batch * ab + at_m[:, None] * am + at_k[None, :] * ak
    b = B + batch * bb + at_k[:, None] * bk + at_n[None, :] * bn
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if EVEN_K:
            x = tl.load(a, mask=in_m[:, None], other=0.0)
            y = tl.load(b, mask=in_n[None, :], other=0.0)
        else:
            in_k = at_k < K - k
            x = tl.load(a, mask=in_m[:, None] & in_k[None, :], other=0.0)
            y = tl.load(b, mask=in_k[:, None] & in_n[None, :], other=0.0)
        if UPCAST:  # the interpreter (triton 3.9) multiplies the bit patterns of bfloat16
            x, y = x.to(tl.float32), y.to(tl.float32)
        sums = tl.dot(x, y, sums, input_precision="ieee")  # of float32; others have one product
        a += BK * ak
        b += BK * bk
    sums *= alpha
    inside = in_m[:, None] & in_n[None, :]
    if HAS_C:
        c = C + batch * cb + at_m[:, None] * cm + at_n[None, :] * cn
        sums += beta * tl.load(c, mask=inside, other=0.0).to(tl.float32)
    found = sums.to(D.dtype.element_ty)
    if SYMMETRIC:
        if row == col:
            found = tl.where(at_m[:, None] >= at_n[None, :], found, tl.trans(found))
        else:
            across = D + batch * db + at_n[:, None] * dm + at_m[None, :] * dn
            tl.store(across, tl.trans(found), mask=in_n[:, None] & in_m[None, :])
    d = D + batch * db + at_m[:, None] * dm + at_n[None, :] * dn
    tl.store(d, found, mask=inside)


@triton.jit
def chunk_sum(
    X, SUMS, COUNT, chunks,
    OF_SQUARES: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of ROUNDS·BLOCK entries, or of their squares: a chunk of a row of X."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks).to(tl.int64) * (ROUNDS * BLOCK)
    at = start + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for _ in range(ROUNDS):
        x = tl.load(X + row * COUNT + at, mask=at < COUNT, other=0.0).to(tl.float32)
        sums += x * x if OF_SQUARES else x
        at += BLOCK
    tl.store(SUMS + tl.program_id(0), tl.sum(sums, axis=0))
