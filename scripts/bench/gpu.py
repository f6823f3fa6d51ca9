"""A check of hf_muon on a GPU in five minutes, next to what was predicted without one.

In: a CUDA device. Out: Markdown tables for docs/gpu.md, with the card and the versions: what the
card reaches, products against float64, bits by batch size, sides that are not multiples of 8,
kernels of one product, whole steps beside torch.optim.Muon, polar factors, TF32. Predictions are
counts of the same steps on meta tensors at the rates of the datasheet (``hf-muon plan``). The card
and its settings are not changed.

    python scripts/bench/gpu.py                # the check; --device names the datasheet
    python scripts/bench/gpu.py --tiny         # rehearses it on a CPU, with small matrices
    python scripts/bench/gpu.py --predict --device h100      # the predictions, on any machine
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from card import Check, cell, versions, waits_of
from torch import Tensor

from hf_muon import Muon
from hf_muon.commands.counted import Counts, counting
from hf_muon.commands.hardware import DEVICES
from hf_muon.commands.plan import short
from hf_muon.commands.roofline import Roofline, host_milliseconds
from hf_muon.polar import orthogonalize

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.scaling_table import MODELS

MINUTES = 5.0
"""No section begins later."""
POLAR: dict[str, Any] = {"coefficients": "polar_express", "steps": 5, "dtype": "bfloat16"}
# Relative errors of a product rounded once to the dtype: half a unit in the last place, and less as
# a root mean square; Triton's interpreter truncates instead of rounding, which is twice as much.
PRODUCT_BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def ceilings(check: Check) -> None:
    """Compare what the card reaches with its datasheet."""

    def rows() -> Iterator[Sequence[object]]:
        sheet = check.sheet
        [side] = check.sides(8192)
        source = torch.empty(2**20 if check.tiny else 2**31, dtype=torch.uint8, device=check.device)
        target = torch.empty_like(source)
        copied = 2 * source.numel() / check.ms(lambda: target.copy_(source)) / 1e9
        yield "memory, copy, TB/s", copied, sheet.memory_tbps, sheet.bytes_per_second / 1e12
        for dtype in (torch.bfloat16, torch.float32):
            x = check.randn(side, side, dtype=dtype)
            in_half = dtype == torch.bfloat16
            rate = 2 * side**3 / check.ms(partial(torch.mm, x, x)) / 1e9
            peak = sheet.tflops if in_half else sheet.float32_tflops
            predicted = sheet.operations_per_second(in_half=in_half) / 1e12
            yield f"{str(dtype)[6:]} product, {side}³, TFLOP/s", rate, peak, predicted

    check.show(
        f"Ceilings ({check.sheet.title})", ("", "measured", "datasheet", "predicted"), rows()
    )


def products(check: Check) -> None:
    """Compare Triton products with float64."""
    module: Any = import_module("hf_muon.polar.kernels.triton_products")

    def error(found: Tensor, exact: Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    def rows() -> Iterator[Sequence[object]]:
        shapes = ((129, 300), (3, 513, 1000), (2, 1024, 5461), (1, 8))
        for dtype, bound in PRODUCT_BOUNDS.items():
            for shape in ((33, 70), (2, 65, 37)) if check.tiny else shapes:
                X, s = check.randn(*shape, dtype=dtype), shape[-2]
                out = X.new_full((*shape[:-1], s), float("nan"))
                module.symmetric_product(X, X.mT, out=out)
                gram = error(out, X.double() @ X.double().mT)
                exactly = torch.equal(out, out.mT)
                A = (out / out.double().norm()).to(dtype)
                A = A.tril() + A.tril(-1).mT
                module.symmetric_product(A, A, A, beta=-4.775, alpha=2.0315, out=out)
                a = A.double()
                quadratic = error(out, -4.775 * a + 2.0315 * a @ a)
                exactly &= torch.equal(out, out.mT)
                fine = max(gram, quadratic) <= bound and exactly
                yield str(dtype)[6:], shape, gram, quadratic, bound, exactly, fine

    columns = ("dtype", "shape", "XXᵀ", "bA + cA²", "bound", "symmetric to the bit", "as predicted")
    check.show("Triton products: relative error against float64", columns, rows())


def bits(check: Check) -> None:
    """Show whether a matrix gets the same bits in a batch as alone."""

    def same(function: Callable[[Tensor], Tensor], X: Tensor) -> list[bool]:
        alone = function(X[0])
        return [torch.equal(function(X[:count])[0], alone) for count in (2, 3, 8)]

    def rows() -> Iterator[Sequence[object]]:
        sides = ((8, 2048), (256, 688), (768, 2048), (1024, 2736), (2048, 5504))
        for shape in sides[1:3] if check.tiny else sides:
            X = check.randn(8, *check.sides(*shape))
            yield shape, "mm and bmm", "no", *same(lambda x: x @ x.mT, X)
            for method in ("newton_schulz", "gram"):
                for kernel in ({}, {"kernel": "triton"})[: 1 if check.triton else 2]:
                    polar = partial(orthogonalize, method=method, **POLAR, **kernel)
                    name = f"{method}, {kernel.get('kernel', 'default')}"
                    yield shape, name, "yes" if kernel else "no", *same(polar, X)

    columns = ("shape", "function", "predicted", "batch of 2", "of 3", "of 8")
    check.show("The bits of a matrix in a batch are those it has alone", columns, rows())


def alignment(check: Check) -> None:
    """Time rows that do not begin at multiples of 16 bytes."""

    def rows() -> Iterator[Sequence[object]]:
        found = {}
        for cols in (5461, 5462, 5464, 5504):
            s, l = check.sides(2048, cols)  # noqa: E741
            X, Q = check.randn(s, l), check.randn(s, s)
            found[cols] = check.ms(lambda X=X: X @ X.mT), check.ms(lambda X=X, Q=Q: Q @ X)
        for cols, times in found.items():
            ratios = [one / of_padded for one, of_padded in zip(times, found[5504], strict=True)]
            yield cols, *times, *ratios, "1" if cols % 8 == 0 else "3 to 10"

    columns = ("columns", "XXᵀ ms", "QX ms", "XXᵀ over 5504", "QX over 5504", "predicted")
    check.show("Sides that are no multiples of 8, 2048 rows, bfloat16", columns, rows())


def one_product(check: Check) -> None:
    """List the kernels of a product that adds to another matrix."""

    def rows() -> Iterator[Sequence[object]]:
        [side] = check.sides(1024)
        C, D = check.randn(2, side, side), check.randn(2, side, side)
        calls: dict[str, Callable[[], object]] = {
            "addmm": lambda: torch.addmm(C[0], C[0], C[1], beta=0.5, out=D[0]),
            "baddbmm": lambda: torch.baddbmm(C, C, C, beta=0.5, out=D),
        }
        for name, call in calls.items():
            call()
            names = check.kernels(call) if check.on_cuda else None
            shown = None if names is None else ", ".join(one[:60] for one in names)
            yield name, "a copy and a GEMM", names and len(names), shown

    check.show("Kernels of one product", ("call", "predicted", "kernels", "names"), rows())


def _models(check: Check) -> dict[str, list[tuple[int, ...]]]:
    def shapes(name: str) -> list[tuple[int, ...]]:
        found = [parameter.shape for parameter in MODELS[name].parameters()]
        return [check.sides(*shape) for shape in (found[:7] if check.tiny else found)]

    lora = [one for m, n in shapes("130M") for one in ((8, n), (m, 8))]
    return {"130M": shapes("130M"), "1B": shapes("1B"), "LoRA r = 8": lora}


def _contenders(check: Check) -> dict[str, Callable[[list[torch.nn.Parameter]], Any]]:
    ours = partial(Muon, lr=1e-3, polar_dtype="bfloat16")
    found: dict[str, Any] = {
        "hf_muon": ours,
        "hf_muon, 32 MiB buckets": partial(ours, bucket_mb=32),
        "hf_muon, four tight steps": partial(ours, polar_steps=4),
    }
    if not check.triton:
        found["hf_muon, products of torch"] = partial(ours, polar_kernel="torch")
        found["hf_muon, products of Triton"] = partial(ours, polar_kernel="triton")
    found["torch.optim.Muon"] = partial(
        torch.optim.Muon, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    return found


def _built(make: Callable[..., Any], shapes: Sequence[tuple[int, ...]], device: Any) -> Any:
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for one in params:
        one.grad = torch.randn_like(one)
    return make(params)


def predicted(make: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> Counts:
    """Count a step on meta tensors."""
    with counting():
        optimizer = _built(make, shapes, "meta")
        optimizer.step()
    with counting() as counts:
        optimizer.step()
    return counts


_MEASURED = ("ms", "host", "launches", "waits", "peak")


def _measured(check: Check, optimizer: Any) -> dict[str, float | None]:
    """Return milliseconds and, on a card, kernels, waits and peak MB of a step."""
    for _ in range(2):
        optimizer.step()
    found: dict[str, float | None] = dict.fromkeys(_MEASURED)
    found["ms"] = check.ms(optimizer.step, times=5)
    start = time.perf_counter()
    optimizer.step()
    found["host"] = 1e3 * (time.perf_counter() - start)
    check.wait()
    if check.on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        check.wait()
        found["peak"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        found["launches"] = len(check.kernels(optimizer.step))
        with waits_of() as waits:
            optimizer.step()
        found["waits"] = len(waits)
    return found


def steps(check: Check) -> None:
    """Compare whole steps: predicted / measured."""

    def both(expected: float, found: float | None) -> str:
        return f"{cell(float(expected))} / {cell(None if found is None else float(found))}"

    def rows() -> Iterator[Sequence[object]]:
        for model, shapes in _models(check).items():
            for name, make in _contenders(check).items():
                if check.tiny and model != "130M" and "Triton" in name:
                    continue  # the interpreter would take too long
                counts = predicted(make, shapes)
                line = Roofline(counts, 0, check.sheet, is_whole=True)
                device = sum(line.milliseconds(of_products=which) for which in (True, False))
                host = host_milliseconds(counts)
                found: dict[str, float | None] = dict.fromkeys(_MEASURED)
                if not check.only_predicts:
                    found = _measured(check, _built(make, shapes, check.device))
                yield (
                    model, name,
                    both(max(device, host), found["ms"]), both(host, found["host"]),
                    both(counts.launches, found["launches"]), both(counts.waits, found["waits"]),
                    both(counts.peak / 1e6, found["peak"]), short(counts.flop / 1e12),
                )  # fmt: skip

    columns = ("model", "optimizer", "step ms", "host ms", "launches", "waits", "peak MB", "TFLOP")
    check.show("Steps, predicted / measured", columns, rows())


def polar_factors(check: Check) -> None:
    """Time polar factors of eight matrices, with the products of torch and of Triton."""

    def rows() -> Iterator[Sequence[object]]:
        shapes = ((768, 2048), (2048, 2048), (2048, 5504), (4096, 11008))
        for shape in shapes[: 1 if check.tiny else 4]:
            X = check.randn(8, *check.sides(*shape))
            for method in ("newton_schulz", "gram"):
                polar = partial(orthogonalize, X, method=method, **POLAR)
                if check.triton:
                    yield shape, method, check.ms(polar, times=5), None, None, None
                    continue
                by_torch, by_triton = (partial(polar, kernel=name) for name in ("torch", "triton"))
                first, second = check.ms(by_torch, times=5), check.ms(by_triton, times=5)
                a, b = by_torch().float(), by_triton().float()
                yield shape, method, first, second, first / second, float((a - b).norm() / a.norm())

    columns = ("shape", "method", "torch ms", "Triton ms", "ratio", "apart by")
    check.show("Polar factors of 8 matrices, five steps, bfloat16", columns, rows())


def tf32(check: Check) -> None:
    """Show the errors of float32 where TF32 is allowed outside."""

    def rows() -> Iterator[Sequence[object]]:
        X = check.randn(*check.sides(256, 688), dtype=torch.float32)
        chosen = {**POLAR, "method": "newton_schulz"}
        exact = orthogonalize(X.double(), **{**chosen, "dtype": "float64"})
        before = torch.get_float32_matmul_precision()
        try:
            for precision in ("highest", "medium"):
                torch.set_float32_matmul_precision(precision)
                factor = orthogonalize(X, **{**chosen, "dtype": "float32"}).double()
                product = (X @ X.mT).double()
                of_product = (product - X.double() @ X.double().mT).norm() / product.norm()
                error = (factor - exact).norm() / exact.norm()
                yield precision, float(error), "below 1e-4", float(of_product)
        finally:
            torch.set_float32_matmul_precision(before)

    columns = ("set outside", "polar factor", "predicted", "a plain product")
    check.show("float32 and TF32: relative error against float64", columns, rows())


SECTIONS: dict[str, tuple[Callable[[Check], None], bool]] = {  # and whether it needs Triton
    "ceilings": (ceilings, False),
    "products": (products, True),
    "bits": (bits, False),
    "alignment": (alignment, False),
    "one-product": (one_product, False),
    "steps": (steps, False),
    "polar": (polar_factors, False),
    "tf32": (tf32, False),
}


def main() -> None:
    """Parse the arguments and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small matrices, on a CPU")
    parser.add_argument("--device", choices=DEVICES, help="datasheet; default: by the card's name")
    parser.add_argument("--predict", action="store_true", help="nothing is run, only foretold")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    given = parser.parse_args()
    if given.predict:
        given.sections = ["steps"]
    elif not given.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny rehearses the check on a CPU")
    check = Check(given)
    torch.manual_seed(0)
    print(f"{versions(check)}.")
    for name in given.sections:
        run, needs_triton = SECTIONS[name]
        if needs_triton and check.triton:
            print(f"\nLeft out: {name} ({check.triton}).")
        elif time.perf_counter() - check.start > 60 * MINUTES:
            print(f"\nLeft out: {name} (over {MINUTES:g} minutes).")
        else:
            run(check)
    print(f"\n{time.perf_counter() - check.start:.0f} s.")


if __name__ == "__main__":
    main()
