"""Time one optimizer step against every published Muon that installs from the package index.

In: a LLaMA shape or a LoRA rank, number of layers, rounds. Out: a table (and JSON) of medians with
their range, ratios within each round, the error of the update, the peak memory within a step, and
state bytes. Contenders take turns in one process on equal parameters and gradients. All use fused
torch.optim.AdamW for the AdamW half, which is faster than what several of them bring.

    scripts/bench/peers.sh && .venv-peers/bin/python scripts/bench/peers.py --model 130m --layers 2
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from contenders import CONTENDERS, DECAY, LR, Make, hf_muon
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from turns import (
    LLAMA,
    VOCABULARY,
    Parameters,
    Step,
    seconds,
    state_bytes_per_parameter,
    summary,
    take_turns,
)

from hf_muon import Muon
from hf_muon.polar import compute_dtype

MODELS = {**LLAMA, "tiny": (32, 64, 1)}
CHECKED = 4
"""Matrices whose update is compared with the exact one: the last, which have every shape."""


@dataclass
class Row:
    """The results of one contender."""

    name: str
    setting: str
    error: float
    milliseconds: list[float]
    ratios: list[float]
    peak_bytes: int
    state_bytes: float


class Entrant:
    """A contender with its own parameters, whose gradients are restored before every step."""

    def __init__(self, setting: str, make: Make, parameters: Parameters) -> None:
        self.setting, self.make, self.parameters = setting, make, parameters
        others = parameters.others
        if make is hf_muon or getattr(make, "func", None) is hf_muon:  # it trains both halves
            settings = getattr(make, "keywords", {})
            groups = [{"params": parameters.matrices}]
            groups += [{"params": others, "algorithm": "adamw"}] if others else []
            self.optimizer = Muon(groups, lr=LR, weight_decay=DECAY, **settings)
            self.step: Step = self.optimizer.step
            return
        self.optimizer = make(parameters.matrices)
        adamw = torch.optim.AdamW(others, lr=LR, weight_decay=DECAY, fused=True) if others else None

        def step() -> None:
            self.optimizer.step()
            if adamw is not None:
                adamw.step()

        self.step = step


def gradients(matrices: Sequence[nn.Parameter], seed: int = 1) -> list[Tensor]:
    """Return gradients: noise plus a signal of low rank."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rank = 4
    return [draw(*p.shape) + draw(p.shape[0], rank) @ draw(rank, p.shape[1]) for p in matrices]


def error_of(make: Make, given: Sequence[Tensor]) -> float:
    """Return the mean ‖P − O‖_F/‖O‖_F: P is the first update of zero weights, O the exact factor.

    The first momentum is a multiple of the gradient in all contenders, also with Nesterov, and zero
    weights do not decay. P contains the step size, which least squares removes.
    """
    weights = [nn.Parameter(torch.zeros_like(gradient)) for gradient in given]
    for weight, gradient in zip(weights, given, strict=True):
        weight.grad = gradient.clone()
    make(weights).step()
    errors = []
    for weight, gradient in zip(weights, given, strict=True):
        exact, P = exact_polar(gradient), weight.detach().double()
        P = P * (P * exact).sum() / P.square().sum()
        errors.append(float((P - exact).norm() / exact.norm()))
    return statistics.mean(errors)


@cache
def exact_polar(gradient: Tensor) -> Tensor:
    """Return O(G) in float64; cached, since all contenders have the same gradients."""
    U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    return U @ Vh


def peak_bytes(step: Step) -> int:
    """Return the most memory that a step adds, from the allocator's record."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return peak


def kept_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the memory for temporaries that an optimizer keeps between steps."""
    workspace = getattr(optimizer, "_workspace", None)
    return 0 if workspace is None else workspace.nbytes


def compare(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Return rows of the contenders that run here, and why the others do not."""
    shape = MODELS[arguments.model]
    layers = arguments.layers or shape[2]

    def fresh() -> Parameters:
        torch.manual_seed(0)
        return Parameters(shape, layers, "cpu", arguments.vocabulary, arguments.lora)

    given = gradients(fresh().matrices)
    entrants: dict[str, Entrant] = {}
    missing: dict[str, str] = {}
    for name in arguments.only or CONTENDERS:
        try:
            entrants[name] = fastest(CONTENDERS[name], fresh, given)
        except Exception as error:  # another package may fail in any way
            missing[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not entrants:
        raise SystemExit(f"error: no contender ran: {missing}")
    steps = {name: entrant.step for name, entrant in entrants.items()}
    rounds = take_turns(
        steps, arguments.repeats, "cpu", before=lambda name: restore(entrants[name], given)
    )
    rows = []
    for name, entrant in entrants.items():
        restore(entrant, given)
        rows.append(
            Row(
                name=name,
                setting=entrant.setting,
                error=error_of(entrant.make, given[-CHECKED:]),
                milliseconds=[1e3 * one[name] for one in rounds],
                ratios=[one[name] / one[next(iter(entrants))] for one in rounds],
                peak_bytes=kept_bytes(entrant.optimizer) + peak_bytes(entrant.step),
                state_bytes=state_bytes_per_parameter(entrant.optimizer),
            )
        )
    return rows, missing


def fastest(
    variants: dict[str, Make], fresh: Callable[[], Parameters], given: Sequence[Tensor]
) -> Entrant:
    """Return the variant with the shortest of three steps, after a warmup step."""
    entrants = [Entrant(setting, make, fresh()) for setting, make in variants.items()]
    if len(entrants) == 1:
        restore(entrants[0], given)
        entrants[0].step()  # if it fails, it fails here
        return entrants[0]
    times = []
    for entrant in entrants:
        times.append([])
        for _ in range(4):
            restore(entrant, given)
            times[-1].append(seconds(entrant.step, "cpu"))
    times = [min(one[1:]) for one in times]
    return entrants[times.index(min(times))]


def restore(entrant: Entrant, given: Sequence[Tensor]) -> None:
    """Restore the gradients: some contenders write to them, or drop them."""
    for parameter, gradient in zip(entrant.parameters.matrices, given, strict=True):
        parameter.grad = gradient.clone()


def as_table(rows: Sequence[Row], title: str) -> Table:
    """Lay out the rows."""
    table = Table(
        "contender", "setting", "error", "ms", "range", f"its time / {rows[0].name}", "range",
        "peak MB", "state bytes / parameter", title=title,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.name, row.setting, f"{row.error:.3f}", *summary(row.milliseconds, ".0f"),
            *summary(row.ratios, ".2f"), f"{row.peak_bytes / 1e6:.1f}", f"{row.state_bytes:.2f}",
        )  # fmt: skip
    return table


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="60m")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="factors alone")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for all results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, missing = compare(arguments)
    layers = arguments.layers or MODELS[arguments.model][2]
    kind = f"LoRA factors of rank {arguments.lora}, " if arguments.lora else ""
    native = compute_dtype("auto", torch.device("cpu")) == torch.bfloat16
    where = "bfloat16" if native else "OURS IN FLOAT32, the others in emulated bfloat16"
    title = f"{kind}LLaMA-{arguments.model}, {layers} layers, {arguments.threads} threads, {where}"
    console = Console(width=150)
    console.print(as_table(rows, title))
    for name, reason in missing.items():
        console.print(f"{name} did not run: {reason}")
    if arguments.json:
        results = {"arguments": vars(arguments), "rows": [asdict(r) for r in rows]}
        text = json.dumps({**results, "missing": missing}, indent=1, default=str)
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
