"""The benefit and the cost of robust aggregation: a byte-level LLaMA under DDP with Muon.

In: ``torchrun --nproc_per_node 4 scripts/bench/robust.py [--steps 150] [--seeds 4]``. Out: from
rank 0 a table (and JSON) of held-out losses after training, mean and standard deviation over seeds,
without an attack and with one: the last rank sends −10 times its gradient. For a given seed, all
aggregations begin with the same weights and see the same batches of Python modules. Learning rates
fall to zero. Steps with each aggregation, and the aggregation of one large bucket, are timed in
turn, without an attack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from hf_muon import create_muon_optimizer
from hf_muon.distributed.robust import METHODS, Robust, make_robust, robust_hook

ATTACK, LR, LENGTH = -10.0, 0.003, 64
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}


MODULES = "argparse inspect typing tarfile subprocess datetime pickle decimal enum doctest ast"


def corpus() -> tuple[Tensor, Tensor]:
    """Return the bytes of Python modules to train on; and every tenth block of 64, held out."""
    texts = [
        (Path(argparse.__file__).parent / f"{name}.py").read_bytes() for name in MODULES.split()
    ]
    every = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).long()
    blocks = every[: len(every) // LENGTH * LENGTH].view(-1, LENGTH)
    is_held_out = torch.arange(len(blocks)) % 10 == 9
    return blocks[~is_held_out].flatten(), blocks[is_held_out][:512]


def wrapped(seed: int, method: str, *, attacked: bool) -> DistributedDataParallel:
    """Return a model under DDP; if attacked, the last rank's gradients are reversed."""
    torch.manual_seed(seed)
    model = DistributedDataParallel(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    if method != "mean":
        make_robust(model, Robust(method))
    if attacked and dist.get_rank() == dist.get_world_size() - 1:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: ATTACK * gradient)
    return model


class Run:
    """One training, a step at a time.

    Args:
        seed: Of weights and batches.
        method: ``mean``, or a method of robust aggregation.
        steps: Number of steps until the learning rates are zero.
        attacked: Whether the last rank sends something other than its gradient.
        batch: Sequences per rank and step.
    """

    def __init__(self, seed: int, method: str, steps: int, *, attacked: bool, batch: int) -> None:
        self.model = wrapped(seed, method, attacked=attacked)
        self.optimizer = create_muon_optimizer(self.model, lr=LR, replicate_group="world")
        self.schedule = LambdaLR(self.optimizer, lambda step: 1 - step / steps)
        self.batch = batch
        self.text, self.held_out = corpus()
        self.draws = torch.Generator().manual_seed(1000 * seed + dist.get_rank())

    def step(self) -> float:
        """Train on a batch of this rank's own.

        Returns:
            The seconds until all ranks were done.
        """
        starts = torch.randint(len(self.text) - LENGTH, (self.batch, 1), generator=self.draws)
        ids = self.text[starts + torch.arange(LENGTH)]
        dist.barrier()
        begin = time.perf_counter()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        dist.barrier()
        return time.perf_counter() - begin

    @torch.no_grad()
    def loss(self) -> float:
        """Return the held-out loss, in nats per byte."""
        ids = self.held_out
        return float(self.model.module(input_ids=ids, labels=ids).loss)


def final_loss(seed: int, method: str, steps: int, *, attacked: bool, batch: int) -> float:
    """Return the held-out loss after training."""
    run = Run(seed, method, steps, attacked=attacked, batch=batch)
    for _ in range(steps):
        run.step()
    return run.loss()


def losses(steps: int, seeds: int, batch: int) -> dict[str, list[float]]:
    """Return held-out losses by aggregation and attack, one per seed."""
    found: dict[str, list[float]] = {}
    for attacked in (False, True):
        for method in ("mean", "median", "multi_krum"):  # on four ranks, trim=1 is the median
            name = f"{method}, {'attacked' if attacked else 'clean'}"
            found[name] = [
                final_loss(seed, method, steps, attacked=attacked, batch=batch)
                for seed in range(seeds)
            ]
    return found


def step_times(repeats: int, batch: int) -> dict[str, list[float]]:
    """Return the seconds of steps by aggregation; the aggregations take turns."""
    runs = {
        method: Run(0, method, repeats + 3, attacked=False, batch=batch)
        for method in ("mean", *METHODS)
    }
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for number in range(repeats + 3):  # the first steps create state, buckets and plans
        for method, run in runs.items():
            taken = run.step()
            if number >= 3:
                seconds[method].append(taken)
    return seconds


class Bucket(NamedTuple):
    """The part of a DDP bucket that the hook reads."""

    flat: Tensor

    def buffer(self) -> Tensor:
        """All gradients of the bucket."""
        return self.flat


def bucket_times(repeats: int) -> dict[str, list[float]]:
    """Return seconds for 25 MiB, DDP's default bucket: all-reduce of the mean, and the hook."""
    flat = torch.randn(25 * 2**18)
    states = {method: Robust(method) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in ("mean", *METHODS)}
    for _ in range(repeats):
        for method, taken in seconds.items():
            dist.barrier()
            begin = time.perf_counter()
            if method == "mean":
                dist.all_reduce(flat.div_(dist.get_world_size()))
            else:
                robust_hook(states[method], Bucket(flat)).wait()
            dist.barrier()
            taken.append(time.perf_counter() - begin)
    return seconds


def table(results: dict[str, Any]) -> Table:
    """Return losses and their distance from the clean mean, also in its standard deviations."""
    clean = results["losses"]["mean, clean"]
    center, spread = statistics.mean(clean), statistics.stdev(clean)
    made = Table("aggregation", "held-out loss", "± over seeds", "from the clean mean")
    for name, values in results["losses"].items():
        mean, own = statistics.mean(values), statistics.stdev(values)
        distance = f"{mean - center:+.4f}, {(mean - center) / spread:+.1f} s.d."
        made.add_row(name, f"{mean:.4f}", f"{own:.4f}", distance)
    return made


def times(seconds: dict[str, list[float]]) -> str:
    """Return median milliseconds, and quartiles of the ratio to the mean within a round."""
    found = []
    for name, own in seconds.items():
        ratios = [one / plain for one, plain in zip(own, seconds["mean"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        times = f"{1e3 * statistics.median(own):.1f} ms"
        found.append(f"{name} {times}, ratio {middle:.2f} ({low:.2f} … {high:.2f})")
    return "; ".join(found)


def main() -> None:
    """Train and time on the ranks of this launch; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    parser.add_argument("--seeds", type=int, default=4, help="trainings of each kind, at least 2")
    parser.add_argument("--batch", type=int, default=16, help="sequences per rank and step")
    parser.add_argument("--repeats", type=int, default=40, help="timed steps of each aggregation")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {
        "ranks": dist.get_world_size(),
        "losses": losses(asked.steps, asked.seeds, asked.batch),
        "seconds": step_times(asked.repeats, asked.batch),
        "bucket": bucket_times(asked.repeats),
    }
    if dist.get_rank() == 0:
        Console(width=100).print(table(results))
        print(f"A step: {times(results['seconds'])}.")
        print(f"A bucket of 25 MiB: {times(results['bucket'])}.")
        if asked.json:
            asked.json.write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
