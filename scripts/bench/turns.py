"""Common parts of the benchmarks of a whole step: parameters, and contenders that take turns.

In: the shape of a model; steps to time. Out: parameters with fixed gradients; seconds per round,
taken in rotating order in one process, so that a busy machine slows all contenders alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

# hidden size, intermediate size, layers (GaLore, arXiv 2403.03507, table 5)
LLAMA = {"60m": (512, 1376, 8), "130m": (768, 2048, 12), "350m": (1024, 2736, 24)}
VOCABULARY = 32_000

Step = Callable[[], None]


def linear_shapes(hidden: int, inner: int) -> list[tuple[int, int]]:
    """(m, n) of the seven linear layers of a LLaMA block."""
    return [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]


class Parameters:
    """The matrices, embeddings and norms of a LLaMA, with fixed random gradients."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        layers: int,
        device: str,
        vocabulary: int = VOCABULARY,
        rank: int = 0,
    ) -> None:
        """Draw them; given a rank, only the LoRA pairs of the matrices."""
        hidden, inner, _ = shape
        sides = linear_shapes(hidden, inner)
        if rank:
            sides = [side for m, n in sides for side in ((rank, n), (m, rank))]
        self.matrices = [_parameter(side, device) for _ in range(layers) for side in sides]
        self.others: list[nn.Parameter] = []
        if not rank:
            self.others += [_parameter((vocabulary, hidden), device) for _ in range(2)]
            self.others += [_parameter((hidden,), device) for _ in range(2 * layers + 1)]


def _parameter(shape: tuple[int, ...], device: str) -> nn.Parameter:
    parameter = nn.Parameter(0.02 * torch.randn(shape, device=device))
    parameter.grad = torch.randn(shape, device=device)
    return parameter


def seconds(step: Step, device: str) -> float:
    """Return the wall time of one step."""
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


Name = TypeVar("Name", bound=Hashable)


def take_turns(
    steps: Mapping[Name, Step],
    repeats: int,
    device: str,
    before: Callable[[Name], None] | None = None,
) -> list[dict[Name, float]]:
    """Return the seconds of each step in each round, after a warmup round.

    Each contender takes each place in the order, because the previous one leaves its data in the
    cache. ``before`` is called with the next contender's name, and not timed.
    """
    names = list(steps)
    rounds = []
    for number in range(-1, repeats):
        first = number % len(names)
        times = {}
        for name in names[first:] + names[:first]:
            if before is not None:
                before(name)
            times[name] = seconds(steps[name], device)
        rounds.append(times)
    return rounds[1:]


def summary(values: Sequence[float], form: str) -> tuple[str, str]:
    """Return the median, and the range."""
    return f"{statistics.median(values):{form}}", f"{min(values):{form}} … {max(values):{form}}"


def state_bytes_per_parameter(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of state per element of the matrices, which are the first group."""
    matrices = optimizer.param_groups[0]["params"]
    size = sum(
        tensor.numel() * tensor.element_size()
        for parameter in matrices
        for tensor in _tensors(optimizer.state[parameter])
    )
    return size / sum(p.numel() for p in matrices)


def _tensors(value: object) -> list[Tensor]:
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for one in value.values() for tensor in _tensors(one)]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return []
