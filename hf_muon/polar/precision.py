"""The dtype that polar factors are computed in.

In: the user's request (None, "auto", a name or a torch.dtype) and the device.
Out: a torch.dtype; and a context in which float32 products really use float32.
``auto`` is bfloat16 where the hardware multiplies it natively, because emulated bfloat16 is many
times slower than float32; float16 on GPUs whose tensor cores support only that; float32 elsewhere.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

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
        if has_native_bfloat16(device.type, device.index):
            return torch.bfloat16
        has_float16 = has_float16_tensor_cores(device.type, device.index)
        return torch.float16 if has_float16 else torch.float32
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError(
            "polar_dtype (dtype of polar_factor) is float16 on a CPU: "
            "its matrix products there are 60 to 110 times slower than bfloat16's; "
            "use 'auto', 'bfloat16' or 'float32'."
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
    if requested is None:
        return None
    is_dtype = isinstance(requested, torch.dtype)
    name = str(requested).removeprefix("torch.") if is_dtype else requested
    check_name("dtype", name, ("auto", *COMPUTE_DTYPES))
    return COMPUTE_DTYPES.get(str(name))


def check_name(argument: str, name: object, allowed: Sequence[str]) -> None:
    """Raise unless a name is allowed; the message suggests the nearest one."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}={name!r} is a {type(name).__name__}; give one of {allowed}.")
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument}={name!r} is unknown; choose one of {list(allowed)}.{hint}")


def in_own_dtype(device_type: str) -> AbstractContextManager[object]:
    """Compute float32 products in float32, whatever autocast and TF32 are set to outside.

    Args:
        device_type: as in ``torch.device.type``, of the matrices.
    """
    context: AbstractContextManager[object] = nullcontext()
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        context = torch.autocast(device_type, enabled=False)
    # A function that is compiled as a whole cannot change settings: the caller's settings apply.
    products = None if torch.compiler.is_compiling() else _float32_products().get(device_type)
    if products and products.fp32_precision not in ("ieee", "none"):
        context = _without_tf32(context)
    return context


@contextmanager
def _without_tf32(inner: AbstractContextManager[object]) -> Iterator[None]:
    # torch (2.9 to 2.13) has an old setting and new ones, for CUDA and for oneDNN, and raises when
    # one is read while they contradict each other, as torch.compile does: so set all of them.
    before = {products: products.fp32_precision for products in _float32_products().values()}
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the new ones were set
        old = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        for products in before:
            products.fp32_precision = "ieee"
        with inner:
            yield
    finally:
        torch.set_float32_matmul_precision(old)
        for products, precision in before.items():
            for value in ("none", precision):  # inherited, if that gives the same
                if products.fp32_precision != precision:
                    products.fp32_precision = value


def _float32_products() -> dict[str, Any]:
    onednn: Any = torch.backends.mkldnn
    return {"cuda": torch.backends.cuda.matmul, "cpu": onednn.matmul}


@cache
def has_native_bfloat16(device_type: str, index: int | None = None) -> bool:
    """Whether a device has instructions for bfloat16 products, rather than an emulation of them.

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


@cache
def has_float16_tensor_cores(device_type: str, index: int | None = None) -> bool:
    """Whether a device is a GPU with tensor cores for float16: compute capability 7.0 or higher.

    The tensor cores of 7.x (V100, T4) do not support bfloat16.

    Args:
        device_type: as in ``torch.device.type``.
        index: which device of that type; None for the current one.
    """
    return device_type == "cuda" and torch.cuda.get_device_capability(index) >= (7, 0)


def _cpu_has_native_bfloat16() -> bool:
    # torch 2.9 to 2.13 answer these questions under private names only. A name that disappears
    # counts as "no", which costs speed but not correctness.
    if platform.machine().lower() in ("x86_64", "amd64"):
        queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, query, bool)() for query in queries)
    # oneDNN's own answer means native support on ARM; on x86 it includes emulation by AVX-512.
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False
