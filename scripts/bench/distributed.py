"""Time the step of several processes: owners that divide matrices against every rank doing all.

In: ``torchrun --nproc_per_node N scripts/bench/distributed.py [--layers 4]``. Out: from rank 0 a
table (and JSON) of medians and of ratios within each round, for DDP and FSDP2, on the matrices of a
LLaMA in float32: for the whole step, and for the polar factors of the rank that spends most time in
them. "redundant" gathers whole gradients where they are sharded, and computes all polar factors on
every rank. The two take turns, so that a busy machine slows both alike. If there are more ranks
than cores, the ratio is that of the work of all ranks together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from turns import LLAMA, linear_shapes, summary

from hf_muon import Muon, MuonConfig
from hf_muon.optimizer import step as optimizer_step
from hf_muon.optimizer.scaling import match_rms_adamw
from hf_muon.optimizer.step import polar_function
from hf_muon.polar import orthogonalize

LR, BETA = 1e-3, 0.95

Step = Callable[[], object]


class Matrices(nn.Module):
    """The hidden matrices of some layers."""

    def __init__(self, hidden: int, inner: int, layers: int) -> None:
        super().__init__()
        sides = linear_shapes(hidden, inner) * layers
        torch.manual_seed(0)
        self.all = nn.ParameterList(nn.Parameter(0.02 * torch.randn(side)) for side in sides)


def build(kind: str, arguments: argparse.Namespace) -> list[nn.Parameter]:
    """Return the parameters under a sharding, with random gradients."""
    hidden, inner, _ = LLAMA[arguments.model]
    model = Matrices(hidden, inner, arguments.layers)
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    return list(model.parameters())


def owner(parameters: list[nn.Parameter], kind: str) -> Step:
    """Return Muon, whose ranks divide the matrices among themselves."""
    group = "world" if kind == "ddp" else None
    return Muon(
        parameters, LR, replicate_group=group, distribute="owner", polar_dtype="float32"
    ).step


def redundant(parameters: list[nn.Parameter], kind: str) -> Step:
    """Return the same update with all polar factors on every rank, from gathered matrices."""
    if kind == "ddp":
        return Muon(parameters, LR, distribute="redundant", polar_dtype="float32").step
    polar = polar_function(MuonConfig(lr=LR, polar_dtype="float32").muon_group())
    averages = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step() -> None:
        for parameter, average in zip(parameters, averages, strict=True):
            average.lerp_(parameter.grad, 1 - BETA)
            mixed = torch.lerp(parameter.grad, average, BETA)
            whole = mixed.full_tensor()
            shard = distribute_tensor(
                polar(whole), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.add_(shard, alpha=-LR * match_rms_adamw(*parameter.shape))

    return step


def seconds(step: Step) -> float:
    """Return the seconds of one step, from when all ranks begin until all have ended."""
    dist.barrier()
    start = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - start


class PolarWork:
    """Measures this rank's seconds in polar factors, in place of the optimizer's function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, *given: Any, **settings: Any) -> torch.Tensor:
        """Compute, and add the time."""
        start = time.perf_counter()
        factor = orthogonalize(*given, **settings)
        self.seconds += time.perf_counter() - start
        return factor

    def of_the_slowest(self) -> float:
        """Return the largest time of any rank since the last call."""
        spent = torch.tensor(self.seconds, dtype=torch.float64)
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        self.seconds = 0.0
        return float(spent)


def compare(kind: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Run rounds in which both take a turn; they alternate in going first."""
    work = optimizer_step.orthogonalize = PolarWork()
    steps = {make.__name__: make(build(kind, arguments), kind) for make in (owner, redundant)}
    rounds = []
    for number in range(-1, arguments.repeats):  # the first round creates state and plans
        order = list(steps) if number % 2 else list(reversed(steps))
        taken = {}
        for name in order:
            taken[name] = seconds(steps[name])
            taken[f"polar, {name}"] = work.of_the_slowest()
        rounds += [taken] if number >= 0 else []
    ratios = {
        kind: sorted(taken[f"{kind}redundant"] / taken[f"{kind}owner"] for taken in rounds)
        for kind in ("", "polar, ")
    }
    return {
        **{name: statistics.median(taken[name] for taken in rounds) for name in steps},
        "redundant / owner": ratios[""],
        "polar factors alone": ratios["polar, "],
    }


def main() -> None:
    """Measure both layouts and print them from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LLAMA, default="60m")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model that are taken")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {kind: compare(kind, arguments) for kind in ("ddp", "fsdp2")}
    if dist.get_rank() == 0:
        report(results, arguments)
    dist.barrier()
    dist.destroy_process_group()


def report(results: dict[str, dict[str, object]], arguments: argparse.Namespace) -> None:
    """Print a table of milliseconds and ratios."""
    ranks = dist.get_world_size()
    names = ("redundant / owner", "polar factors alone")
    table = Table("layout", "ranks", "owner ms", "redundant ms", *names)
    for kind, result in results.items():
        times = (f"{1000 * result[name]:.0f}" for name in ("owner", "redundant"))
        ratios = ("{} ({})".format(*summary(result[name], ".2f")) for name in names)
        table.add_row(kind, str(ranks), *times, *ratios)
    Console(width=100).print(table)
    if arguments.json:
        facts = {"ranks": ranks, **vars(arguments), "json": None, "results": results}
        arguments.json.write_text(json.dumps(facts, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
