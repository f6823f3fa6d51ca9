"""Step-size factors: how far to go along a polar factor.

In: (m, n) = (fan_out, fan_in) of the whole matrix, never of a shard. Out: the step-size factor,
which multiplies the learning rate. A polar factor has spectral norm 1, Frobenius norm √min(m, n)
and hence RMS 1/√max(m, n); each rule states which norm of the update it fixes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hf_muon.distributed.layout import Matrix


def match_rms_adamw(m: int, n: int) -> float:
    """0.2·√max(m, n) fixes the RMS at 0.2, typical of AdamW (arXiv 2502.16982, eq. 4)."""
    return 0.2 * math.sqrt(max(m, n))


def original(m: int, n: int) -> float:
    """√max(1, m/n): K. Jordan's rule (https://kellerjordan.github.io/posts/muon/)."""
    return math.sqrt(max(1, m / n))


def spectral(m: int, n: int) -> float:
    """√(m/n) fixes the operator norm between RMS norms at 1 (arXiv 2310.17813)."""
    return math.sqrt(m / n)


def none(m: int, n: int) -> float:
    """1 fixes the spectral norm."""
    return 1.0


STEP_SIZES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": match_rms_adamw,
    "original": original,
    "spectral": spectral,
    "none": none,
}


def step_size(rule: str, matrix: Matrix) -> float:
    """Return the step-size factor for one matrix, in its own orientation.

    Raises:
        ValueError: The rule depends on which side is fan_out, and the layer does not declare it.
    """
    rows, cols = matrix.rows, matrix.cols
    if matrix.fan_out_dim is None and rows != cols and rule in ("original", "spectral"):
        raise ValueError(
            f"adjust_lr={rule!r} needs to know which side of a {rows} by {cols} matrix is fan_out, "
            "and its layer does not say. Use adjust_lr='match_rms_adamw' or 'none', or send the "
            "parameter to AdamW with adamw_params."
        )
    m, n = (cols, rows) if matrix.fan_out_dim == 1 else (rows, cols)
    return STEP_SIZES[rule](m, n)
