"""Time one optimizer step against torch.optim.Muon with fused torch.optim.AdamW.

In: a LLaMA shape, number of layers, repeats. Out: a table (and JSON) of medians with spread, of
ratios within each round, and of state bytes per matrix parameter. Contenders take turns in one
process on the same gradients, so that a busy machine slows all of them alike.

torch.optim.Muon always computes in bfloat16. If a CPU only emulates bfloat16, "torch, float32" is
the same code without the cast to bfloat16, for a fair comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turns import LLAMA, Parameters, Step, seconds, state_bytes_per_parameter, summary, take_turns

from hf_muon import Muon
from hf_muon.polar import Workspace, compute_dtype, orthogonalize

LR, DECAY = 1e-3, 0.1


def ours(parameters: Parameters, **settings: object) -> tuple[Step, torch.optim.Optimizer]:
    """hf_muon, both halves in one optimizer."""
    groups = [
        {"params": parameters.matrices},
        {"params": parameters.others, "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, **{"lr": LR, "weight_decay": DECAY, **settings})
    return optimizer.step, optimizer


def torchs(parameters: Parameters, precision: str) -> tuple[Step, torch.optim.Optimizer]:
    """torch.optim.Muon for the matrices and fused torch.optim.AdamW for the rest."""
    muon = torch.optim.Muon(
        parameters.matrices, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(parameters.others, lr=LR, weight_decay=DECAY, fused=True)

    def step() -> None:
        with computing_in(precision):
            muon.step()
        adamw.step()

    return step, muon


def computing_in(precision: str) -> AbstractContextManager[object]:
    """Replace the cast to bfloat16 with which torch.optim.Muon begins."""
    if precision == "bfloat16":
        return nullcontext()
    return mock.patch.object(Tensor, "bfloat16", Tensor.float)


def contenders(arguments: argparse.Namespace) -> Iterator[tuple[str, Step, torch.optim.Optimizer]]:
    """Yield each contender with its own parameters."""
    shape = LLAMA[arguments.model]
    layers = arguments.layers or shape[2]
    matched = {"coefficients": "quintic", "polar_method": "newton_schulz"}
    native = natively_bfloat16(arguments)

    def fresh() -> Parameters:
        torch.manual_seed(0)
        return Parameters(shape, layers, arguments.device)

    yield "hf_muon, defaults", *ours(fresh())
    yield "hf_muon, four tight steps", *ours(fresh(), polar_steps=4)
    yield "hf_muon, five of polar_express", *ours(fresh(), coefficients="polar_express")
    yield "hf_muon, torch's settings", *ours(fresh(), **matched)
    if arguments.compile:
        yield "hf_muon, defaults, compiled", *ours(fresh(), compile=True)
    if not native:
        yield "torch, float32", *torchs(fresh(), "float32")
    if native or arguments.bfloat16:
        yield "torch, bfloat16", *torchs(fresh(), "bfloat16")


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    """Interleave the contenders; ratios are taken within each round."""
    entries = list(contenders(arguments))
    steps = {name: step for name, step, _ in entries}
    rounds = take_turns(steps, arguments.repeats, arguments.device)
    reference = entries[-1][0]
    table = Table(
        "contender", "ms", "spread", f"{reference} / this", "spread", "state bytes / parameter",
        title=f"LLaMA-{arguments.model}, {arguments.layers or LLAMA[arguments.model][2]} layers, "
        f"{arguments.device}, {torch.get_num_threads()} threads, {arguments.repeats} rounds",
    )  # fmt: skip
    results = []
    for name, _, optimizer in entries:
        times = [1e3 * one[name] for one in rounds]
        ratios = [one[reference] / one[name] for one in rounds]
        bytes_each = state_bytes_per_parameter(optimizer)
        table.add_row(name, *summary(times, ".0f"), *summary(ratios, ".2f"), f"{bytes_each:.3f}")
        results.append({"name": name, "ms": times, "ratios": ratios, "state_bytes": bytes_each})
    Console(width=120).print(table)
    return {"arguments": vars(arguments), "contenders": results}


def compare_batching(arguments: argparse.Namespace) -> dict[str, object]:
    """Orthogonalize 16 small matrices in one batch and one by one."""
    count, workspace = 16, Workspace()
    table = Table(
        "shape", "dtype", "batch ms", "loop / batch", "quartiles", title=f"{count} matrices"
    )
    results = {}
    shapes = [(4, 768), (8, 384), (8, 2048), (16, 768), (16, 16), (64, 64), (64, 256)]
    shapes += [(128, 128), (128, 344), (256, 256), (256, 688), (512, 512)]
    dtypes = ["float32"] + ["bfloat16"] * (arguments.bfloat16 or natively_bfloat16(arguments))
    for (m, n), dtype in product(shapes, dtypes):
        x = torch.randn(count, m, n, device=arguments.device).to(getattr(torch, dtype))
        polar = partial(
            orthogonalize, method="auto", coefficients="polar_express", steps=5, dtype=dtype,
            workspace=workspace,
        )  # fmt: skip

        def loop(x: Tensor = x, polar: Callable[..., Tensor] = polar) -> None:
            for matrix in x:
                polar(matrix, out=matrix)

        def batch(x: Tensor = x, polar: Callable[..., Tensor] = polar) -> None:
            polar(x, out=x)

        loop(), batch()
        times = [
            (seconds(loop, arguments.device), seconds(batch, arguments.device))
            for _ in range(3 * arguments.repeats)
        ]
        together = 1e3 * statistics.median(batched for _, batched in times)
        ratios = [alone / batched for alone, batched in times]
        low, middle, high = statistics.quantiles(ratios, n=4)
        summarized = (f"{together:.2f}", f"{middle:.2f}", f"{low:.2f} … {high:.2f}")
        table.add_row(f"{m} × {n}", dtype, *summarized)
        results[f"{m}x{n} {dtype}"] = ratios
    Console().print(table)
    return {"arguments": vars(arguments), "loop_over_batch": results}


def natively_bfloat16(arguments: argparse.Namespace) -> bool:
    """Whether the device has instructions for bfloat16."""
    return compute_dtype("auto", torch.device(arguments.device)) == torch.bfloat16


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LLAMA, default="60m")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="add the compiled iteration")
    parser.add_argument("--batching", action="store_true", help="small matrices, loop and batch")
    parser.add_argument(
        "--bfloat16", action="store_true", help="add torch's bfloat16 where it is emulated"
    )
    parser.add_argument("--json", type=Path, help="file for all times")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = compare_batching(arguments) if arguments.batching else compare(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
