"""What the optimizer adds to a training step of adapters, as a ratio to AdamW.

In: ``python step_cost.py configs/smollm2_sentiment.yaml [--ranks 8 64] [--updates factor product
tangent] [--repeats 5] [-- RUN OPTIONS]``. Out: ``step_cost.json`` and a table. Forward and backward
of one batch and the steps of all optimizers take turns, so that other work on the machine slows all
of them alike. On a CPU, seconds are processor time, with one thread.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import run
import settings
import torch
from rich.console import Console
from rich.table import Table
from shared.arguments import RecipeError
from shared.measure import write_json
from shared.progress import quiet_libraries
from study.folder import split_extra
from transformers import Trainer, set_seed

import hf_muon

RATE = 1e-6  # so small that the weights hardly change


def main(argv: list[str]) -> dict[str, Any]:
    """Measure rank by rank, write the seconds and print the table."""
    own, extra = split_extra(argv)
    arguments = command_line(own)
    torch.set_num_threads(1)
    quiet_libraries()
    report: dict[str, Any] = {
        "command": shlex.join(["python", "step_cost.py", *argv]),
        "config": arguments.config,
        "ranks": {},
    }
    for rank in arguments.ranks:
        report["ranks"][rank] = measured(arguments, rank, extra)
        print(f"rank {rank}: done", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "step_cost.json", report)
    Console().print(table(report))
    return report


def command_line(argv: list[str]) -> argparse.Namespace:
    """Return the parsed arguments; what follows ``--`` goes to the Trainer that makes the batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="configuration, e.g. configs/smollm2_sentiment.yaml")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--updates", nargs="+", default=["factor", "product", "tangent"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/lora_finetune/step_cost"))
    return parser.parse_args(argv)


def measured(arguments: argparse.Namespace, rank: int, extra: list[str]) -> dict[str, Any]:
    """Return the median seconds of forward and backward and of each optimizer's step."""
    words = [arguments.config, "--r", str(rank), "--output_dir", str(arguments.out), *extra]
    model, data, args, _ = settings.parse(words)
    set_seed(args.seed)
    trainer, _ = run.TASKS[model.task].build(model, data, args)
    batch = next(iter(trainer.get_train_dataloader()))
    stages = {"forward and backward": lambda: gradients(trainer, batch)}
    stages |= {
        name: optimizer.step for name, optimizer in optimizers(trainer, arguments.updates).items()
    }
    seconds = interleaved(stages, arguments.repeats)
    return {
        "tokens": int(batch["attention_mask"].sum()),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "all_seconds": seconds,
    }


def gradients(trainer: Trainer, batch: Mapping[str, Any]) -> None:
    """Compute the gradients of a batch."""
    trainer.model.zero_grad()
    with trainer.compute_loss_context_manager():  # bfloat16 if the arguments say so
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()


def optimizers(trainer: Trainer, updates: list[str]) -> dict[str, torch.optim.Optimizer]:
    """Return fused AdamW, and Muon with each update, all for the same adapters."""
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    muons = {
        update: hf_muon.create_muon_optimizer(trainer.model, lr=RATE, lora_update=update)
        for update in updates
    }
    return {"adamw": torch.optim.AdamW(weights, lr=RATE, fused=True), **muons}


def interleaved(stages: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each stage, all stages taking turns after a warmup round."""
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(1 + repeats):
        for name, stage in stages.items():
            start = time.process_time()
            stage()
            seconds[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in seconds.items()}


def table(report: Mapping[str, Any]) -> Table:
    """Return seconds, share of the step and ratio of the whole step to AdamW's."""
    shown = Table("rank", "optimizer", "seconds", "share of the step", "step / AdamW's step")
    for rank, part in report["ranks"].items():
        seconds = dict(part["seconds"])
        gradient = seconds.pop("forward and backward")
        shown.add_row(str(rank), "(forward and backward)", f"{gradient:.3f}", "", "")
        for name, step in seconds.items():
            whole = gradient + step
            ratio = f"{whole / (gradient + seconds['adamw']):.3f}"
            shown.add_row(str(rank), name, f"{step:.3f}", f"{step / whole:.1%}", ratio)
        shown.add_section()
    return shown


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
