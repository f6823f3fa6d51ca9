"""What a run measures about itself.

In: a ``Trainer`` while it trains. Out: tokens per second, the optimizer's share of the step time,
the bytes of optimizer state, and ``results.json``, which holds all that a comparison needs.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import ProgressCallback, Trainer, TrainerCallback

import hf_muon


class StepClock(TrainerCallback):
    """Adds up the seconds of whole training steps and, within them, of the optimizer.

    Evaluation and saving are not counted, nor is the first step, in which libraries load kernels
    and the optimizer creates its state.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.step_seconds = 0.0
        self.optimizer_seconds = 0.0
        self._mark: float | None = None
        self._optimizer_start = 0.0
        self._optimizer_last = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock before the first step."""
        if self._mark is None:
            self._mark = now()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note when the optimizer starts."""
        self._optimizer_start = now()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note how long the optimizer took."""
        self._optimizer_last = now() - self._optimizer_start

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Add the step that just ended, unless it was the first."""
        end = now()
        if self.steps > 0 and self._mark is not None:
            self.step_seconds += end - self._mark
            self.optimizer_seconds += self._optimizer_last
        self.steps += 1
        self._mark = end

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Leave the evaluation out of the next step."""
        self._mark = now()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leave the writing of a checkpoint out of the next step."""
        self._mark = now()

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """Return the training speed, or None when fewer than two steps were taken."""
        return (self.steps - 1) * tokens_per_step / self.step_seconds if self.steps > 1 else None

    def optimizer_share(self) -> float | None:
        """Return the optimizer's share of the step time, or None before the second step."""
        return self.optimizer_seconds / self.step_seconds if self.steps > 1 else None


def now() -> float:
    """Return a clock reading that includes the work an accelerator still has queued."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar, with the losses in the bar instead of a line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the last training and validation loss."""
        if self.training_bar is not None and logs:
            self._shown = {**getattr(self, "_shown", {}), **shown_losses(logs)}
            self.training_bar.set_postfix(self._shown)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Show no second bar: the evaluations along the way are short."""


class LogLines(TrainerCallback):
    """A short line per log, where no progress bar is wanted; ``launch.py`` reads them."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print the step and the losses that were logged."""
        losses = shown_losses(logs or {})
        if state.is_world_process_zero and losses:
            said = ", ".join(f"{name} {loss}" for name, loss in losses.items())
            print(f"step {state.global_step}/{state.max_steps}: {said}", flush=True)


def shown_losses(logs: dict[str, Any]) -> dict[str, str]:
    """Return the losses of a log under short names."""
    names = {"loss": "loss", "eval_loss": "validation"}
    return {short: f"{float(logs[name]):.3f}" for name, short in names.items() if name in logs}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of optimizer state that this process holds.

    Storage is counted, not entries: under ZeRO there are placeholders that repeat one zero.
    """
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.untyped_storage().nbytes() for tensor in local)


def exact_loss(trainer: Trainer, blocks: datasets.Dataset) -> float:
    """Return the mean loss over all blocks, whatever the number of processes.

    Processes that evaluate together fill the last round of batches up with repeated blocks, which
    then count. So the blocks of an incomplete round are evaluated one by one.
    """
    args = trainer.args
    rest = len(blocks) % (args.per_device_eval_batch_size * args.world_size)
    if args.world_size == 1 or rest == 0:
        return mean_loss(trainer, blocks)
    whole = len(blocks) - rest
    batch, args.per_device_eval_batch_size = args.per_device_eval_batch_size, 1
    total = rest * mean_loss(trainer, blocks.select(range(whole, len(blocks))))
    args.per_device_eval_batch_size = batch
    if whole:
        total += whole * mean_loss(trainer, blocks.select(range(whole)))
    return total / len(blocks)


def mean_loss(trainer: Trainer, blocks: datasets.Dataset) -> float:
    """Return the loss that the Trainer measures on blocks."""
    return trainer.evaluate(blocks, metric_key_prefix="final")["final_loss"]


def curve(history: list[dict[str, Any]], key: str, tokens_per_step: int) -> list[dict[str, Any]]:
    """Return the logged values of ``key`` with their step and token count.

    A resumed run evaluates the step it resumes from a second time; one value is kept.
    """
    by_step = {entry["step"]: entry[key] for entry in history if key in entry}
    return [
        {"step": step, "tokens": step * tokens_per_step, "loss": loss}
        for step, loss in sorted(by_step.items())
    ]


def run_results(trainer: Trainer, clock: StepClock, tokens_per_step: int) -> dict[str, Any]:
    """Return what the finished training itself says; the caller adds model and data."""
    args, history = trainer.args, trainer.state.log_history
    share = clock.optimizer_share()
    speed = clock.tokens_per_second(tokens_per_step)
    return {
        "optim": str(getattr(args.optim, "value", args.optim)),
        "optim_args": args.optim_args,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * tokens_per_step,
        "tokens_per_second": round(speed, 1) if speed else None,
        "optimizer_share": round(share, 4) if share else None,
        "optimizer_state_bytes": state_bytes(trainer.optimizer),
        "train_curve": curve(history, "loss", tokens_per_step),
        "eval_curve": curve(history, "eval_loss", tokens_per_step),
        "training_arguments": args.to_dict(),
        "world_size": args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_muon": getattr(hf_muon, "__version__", None),
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf8")
