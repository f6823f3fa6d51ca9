"""``hf-muon env``: versions and devices, as a block for a bug report.

In: this machine. Out: lines of plain text: versions, devices, whether they have bfloat16
instructions, and the kernel and dtype for polar factors. It contains nothing from a user's files or
settings.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
import typer

from hf_muon.polar import compute_dtype
from hf_muon.polar.kernels import products_for
from hf_muon.polar.precision import has_native_bfloat16
from hf_muon.values import sentence

PACKAGES = (
    "hf-muon", "torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "datasets",
    "triton",
)  # fmt: skip
_WIDTH = 13


def env() -> None:
    """Print versions and devices, for a bug report."""
    for name, text in facts():
        typer.echo(f"{name:{_WIDTH}} {text}")


def facts() -> Iterator[tuple[str, str]]:
    """Yield (name, description) pairs in the order in which they are shown."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        yield package, installed(package) or "not installed"
    for device in devices():
        yield str(device), _described(device)
        has = "has" if has_native_bfloat16(device.type, device.index) else "has no"
        yield "", f"{has} instructions for bfloat16; {_polar_factors(device)}"


def installed(package: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> list[torch.device]:
    """Return the CPU and every accelerator that torch sees."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        if kind is not None:
            found += [torch.device(kind.type, n) for n in range(torch.accelerator.device_count())]
    return found


def _described(device: torch.device) -> str:
    if device.type == "cpu":
        asks = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
        cores = len(asks(0)) if asks else os.cpu_count() or 1
        threads = torch.get_num_threads()
        return f"{cores} core{'s' * (cores > 1)}, {threads} thread{'s' * (threads > 1)} of torch"
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        hip = torch.version.hip
        runtime = f"HIP {hip}" if hip else f"CUDA {torch.version.cuda}"
        return (
            f"{found.name}, {found.total_memory / 1e9:.0f} GB, compute capability "
            f"{found.major}.{found.minor}, {runtime}"
        )
    return "an accelerator"


def _polar_factors(device: torch.device) -> str:
    """Return which kernel computes polar factors in which dtype, after the check at first use."""
    dtype = compute_dtype(None, device)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kernel = products_for("auto", device, dtype, by_halves=True).name
    except Exception as error:  # a driver may raise anything; the rest is printed all the same
        return f"polar factors in {str(dtype)[6:]} fail: {sentence(error)}"
    note = (
        f" ({sentence(said[-1].message)})" if said and isinstance(said[-1].message, Warning) else ""
    )
    return f"polar factors in {str(dtype)[6:]} by {kernel}{note}"
