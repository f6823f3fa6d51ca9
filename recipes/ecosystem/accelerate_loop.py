"""A training loop with accelerate and no Trainer: ``prepare``, ``save_state``, ``load_state``.

In: ``accelerate launch accelerate_loop.py [--steps 60] [--stop_at 30] [--resume]``, or plain
``python``. Out: losses on the screen, the held-out loss before and after, a sample, and the state
in ``--folder``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from bytes_llama import build_model, held_out_loss, rows, sample

from hf_muon import create_muon_optimizer


class Progress:
    """The number of steps done; accelerate saves and loads it with the rest."""

    steps = 0

    def state_dict(self) -> dict[str, int]:
        """Return what to save."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what was saved."""
        self.steps = state["steps"]


def main(argv: list[str]) -> tuple[float, float]:
    """Train, save, and return the held-out loss before and after."""
    args = parse(argv)
    accelerator = Accelerator()
    set_seed(0)
    model, progress = build_model(), Progress()
    # "world": under DDP every process holds a copy of each tensor. It has no effect in one process.
    optimizer = create_muon_optimizer(model, lr=args.lr, weight_decay=0.1, replicate_group="world")
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    # The schedule steps once per step, whatever the number of processes. So it is registered with
    # the progress and not prepared: a prepared schedule steps once for each process.
    accelerator.register_for_checkpointing(progress, schedule)
    if args.resume:
        accelerator.load_state(args.folder)

    before = held_out_loss(accelerator.unwrap_model(model))
    while progress.steps < (args.stop_at or args.steps):
        batch = rows(progress.steps, accelerator.process_index, accelerator.num_processes)
        batch = batch.to(accelerator.device)
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.steps += 1
        if progress.steps % args.log_every == 0:
            mean = accelerator.reduce(loss.detach(), reduction="mean").item()
            accelerator.print(f"step {progress.steps}/{args.steps}: loss {mean:.3f}")
    accelerator.save_state(args.folder)
    trained = accelerator.unwrap_model(model)
    after = held_out_loss(trained)
    accelerator.print(f"{sample(trained)}\nheld-out loss {before:.3f} → {after:.3f}")
    accelerator.end_training()
    return before, after


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--log_every", type=int, default=20)
    parser.add_argument("--stop_at", type=int, help="save and stop before the last step")
    parser.add_argument("--folder", type=Path, default=Path("runs/ecosystem/accelerate"))
    parser.add_argument("--resume", action="store_true", help="go on from what was saved")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
