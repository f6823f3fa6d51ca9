"""The dtype the polar factor is computed in.

In: what the user asked for (None, "auto", a name or a torch.dtype) and the device.
Out: a torch.dtype.
``auto`` is bfloat16 where the hardware multiplies it natively and float32 elsewhere: emulated
bfloat16 is many times slower than float32.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Sequence
from functools import cache

import torch

COMPUTE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Names a user may give besides ``auto``."""


def compute_dtype(requested: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Resolve a request for a compute dtype on a device.

    Args:
        requested: None or ``"auto"`` for the device's best, a key of ``COMPUTE_DTYPES``, or one of
            their torch dtypes.
        device: where the matrices are.

    Returns:
        The dtype to compute in.

    Raises:
        TypeError: the request is neither a string nor a dtype nor None.
        ValueError: the name or dtype is not one of those allowed, or it is float16 on a CPU.
    """
    dtype = _explicit_dtype(requested)
    if dtype is None:
        return torch.bfloat16 if has_native_bfloat16(device.type, device.index) else torch.float32
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError(
            "dtype='float16' on a CPU: its matrix products there are 60 to 110 times slower than "
            "bfloat16's; use 'auto', 'bfloat16' or 'float32'."
        )
    return dtype


def svd_dtype(requested: str | torch.dtype | None, given: torch.dtype) -> torch.dtype:
    """Resolve a request for the decomposition, which exists in float32 and float64 only.

    Args:
        requested: as in ``compute_dtype``.
        given: dtype of the matrices.

    Returns:
        float64 on request, or for float64 matrices without a request; float32 otherwise.

    Raises:
        TypeError: as ``compute_dtype``.
        ValueError: the name or dtype is not one of those allowed.
    """
    dtype = _explicit_dtype(requested)
    return torch.float64 if (dtype or given) == torch.float64 else torch.float32


def _explicit_dtype(requested: str | torch.dtype | None) -> torch.dtype | None:
    """Turn a name or dtype into an allowed dtype, and None or ``auto`` into None."""
    allowed = ["auto", *COMPUTE_DTYPES]
    if requested is None or requested == "auto":
        return None
    if isinstance(requested, str):
        if requested not in COMPUTE_DTYPES:
            raise ValueError(unknown_name("dtype", requested, allowed))
        return COMPUTE_DTYPES[requested]
    if not isinstance(requested, torch.dtype):
        raise TypeError(
            f"dtype={requested!r} is a {type(requested).__name__}; give None, a torch.dtype or one "
            f"of {allowed}."
        )
    if requested not in COMPUTE_DTYPES.values():
        raise ValueError(f"dtype={requested} is not supported; choose one of {allowed}.")
    return requested


def unknown_name(argument: str, name: str, allowed: Sequence[str]) -> str:
    """Word the error for a name that is not allowed, with the nearest one that is."""
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{argument}={name!r} is unknown; choose one of {list(allowed)}.{hint}"


@cache
def has_native_bfloat16(device_type: str, index: int | None = None) -> bool:
    """Say whether a device has instructions for bfloat16 products, not an emulation of them.

    Args:
        device_type: as in ``torch.device.type``.
        index: which device of that type; None for the current one.

    Returns:
        False for device types that offer no way to ask.
    """
    if device_type == "cuda":
        with torch.cuda.device(index):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device_type == "xpu":
        return bool(torch.xpu.is_bf16_supported(including_emulation=False))
    return device_type == "cpu" and _cpu_has_native_bfloat16()


def _cpu_has_native_bfloat16() -> bool:
    # torch 2.9 to 2.13 answer these questions under private names only; a name that went away
    # counts as "no", which costs speed and never correctness.
    if platform.machine().lower() in ("x86_64", "amd64"):
        queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, query, bool)() for query in queries)
    # oneDNN's own answer means native support on ARM; on x86 it includes emulation by AVX-512.
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False
