"""A GPU, or a CPU in its place: how to time it, what it launches, how to show the results.

In: arguments of the check (``gpu.py``). Out: medians, names of kernels, waits, Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from itertools import chain

import torch
from torch import Tensor

from hf_muon.commands.hardware import DEVICES
from hf_muon.commands.plan import short


class Check:
    """The device, how to time it, and how to show results."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.tiny, self.only_predicts = given.tiny, given.predict
        self.device = torch.device("cpu" if given.tiny or given.predict else "cuda")
        self.on_cuda = self.device.type == "cuda"
        self.sheet = DEVICES[given.device or _sheet(self.on_cuda)]
        self.start = time.perf_counter()
        self.triton = _triton(self.on_cuda)

    def sides(self, *sides: int) -> tuple[int, ...]:
        """Return sides of matrices, divided by 32 in the rehearsal."""
        return tuple(max(1, side // 32) for side in sides) if self.tiny else sides

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return random numbers on the device."""
        return torch.randn(*shape, device=self.device).to(dtype)

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def ms(self, run: Callable[[], object], times: int = 10) -> float:
        """Return the median milliseconds of a call, including the device's work."""
        for _ in range(0 if self.tiny else 3):
            run()
        found = []
        for _ in range(1 if self.tiny else times):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            found.append(1e3 * (time.perf_counter() - start))
        return statistics.median(found)

    def kernels(self, run: Callable[[], object]) -> list[str]:
        """Return the names of the kernels that a call launches, without copies from and to host."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            self.wait()
        names = chain.from_iterable([event.key] * event.count for event in found.key_averages())
        return [name for name in names if not name.startswith(("Memcpy HtoD", "Memcpy DtoH"))]

    def show(self, heading: str, columns: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
        """Print a table, row by row."""
        print(f"\n### {heading}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {' | '.join(map(cell, row))} |", flush=True)


def cell(value: object) -> str:
    """Format a value as a cell of a table; a dash for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(value) if isinstance(value, float) else "–" if value is None else str(value)


def _sheet(on_cuda: bool) -> str:
    """Return the datasheet that matches the name of the card, or a generic one."""
    card = torch.cuda.get_device_name().lower() if on_cuda else ""
    return next((name for name in DEVICES if name in card.replace(" ", "")), "cuda")


def _triton(on_cuda: bool) -> str:
    """Return why Triton products cannot be tested; empty if they can."""
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "no Triton products: a CPU takes TRITON_INTERPRET=1, and some minutes"
    try:
        import_module("hf_muon.polar.kernels.triton_products")
    except ImportError as error:
        return f"no Triton products: {error}"
    return ""


@contextmanager
def waits_of() -> Iterator[list[str]]:
    """Collect torch's warnings about each wait of the host for the device."""
    before, said = torch.cuda.get_sync_debug_mode(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            torch.cuda.set_sync_debug_mode(before)
    said += [str(one.message) for one in caught if "synchroniz" in str(one.message)]


def versions(check: Check) -> str:
    """Return the card, and the versions of the software."""
    triton = ""
    if not check.triton:
        triton = f", triton {import_module('triton').__version__}"
    card = platform.machine()
    if check.on_cuda:
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        card = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {memory:.0f} GB)"
    return (
        f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}{triton}, "
        f"hf_muon {version('hf-muon')}, Python {platform.python_version()}"
    )
