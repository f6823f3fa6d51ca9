"""The cost of a SpectralMonitor in the pretraining recipe, as a share of its step time.

In: a configuration of ``recipes/llama_pretrain``, a number of steps. Out: a table: seconds of
sampled and of other steps in one run, and the share that sampling every 50 steps, the default,
adds.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback, set_seed

from hf_muon import SpectralMonitor

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "llama_pretrain"))

import packing
import run
import settings

DEFAULT_EVERY = inspect.signature(SpectralMonitor).parameters["every"].default


class Clock(TrainerCallback):
    """Measures each step from its beginning to that of the next, logs and callbacks included."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Read the clock."""
        self.marks.append(time.perf_counter())

    def seconds(self) -> dict[int, float]:
        """Return seconds by step, from step 1; the last step has no end."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {step: end - start for step, (start, end) in enumerate(pairs, 1)}


def main() -> None:
    """Train a few steps, sample some of them, and compare the two kinds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/5m.yaml")
    parser.add_argument("--steps", type=int, default=14, help="of the run")
    parser.add_argument("--every", type=int, default=4, help="steps between samples in the run")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(asked.config, asked.steps, asked.every, folder)
    # The first step loads kernels and creates the state of the optimizer.
    plain = [value for step, value in seconds.items() if step > 1 and step % asked.every]
    sampled = [value for step, value in seconds.items() if step % asked.every == 0]
    step, sample = statistics.median(plain), statistics.median(sampled)
    share = (sample - step) / (DEFAULT_EVERY * step)
    table = Table("", "steps", "median s", "from", "to", title=f"{asked.config}, one run")
    for name, values in (("plain step", plain), ("sampled step", sampled)):
        row = (statistics.median(values), min(values), max(values))
        table.add_row(name, str(len(values)), *(f"{value:.2f}" for value in row))
    Console().print(table)
    print(f"A sample every {DEFAULT_EVERY} steps adds {share:.2%} to the step time.")


def measure(config: str, steps: int, every: int, folder: str) -> dict[int, float]:
    """Return the seconds of every step of a run that is sampled every few steps."""
    limits = ["--max_steps", str(steps), "--eval_strategy", "no", "--eval_on_start", "false"]
    quiet = ["--disable_tqdm", "true", "--use_cpu", "true", "--output_dir", folder]
    shape, corpus, args, _ = settings.parse([config, *limits, *quiet])
    data = run.prepare(corpus, args.max_steps)
    set_seed(args.seed)
    clock = Clock()
    trainer = Trainer(
        model=run.build_model(shape, data),
        args=args,
        train_dataset=data.train,
        data_collator=packing.collate,
        callbacks=[clock, SpectralMonitor(every=every)],
    )
    trainer.train()
    return clock.seconds()


if __name__ == "__main__":
    main()
