"""Measurements of a run.

In: a ``Trainer`` while it trains. Out: the optimizer's share of the step time, the bytes of
optimizer state, the curves, and a JSON file with everything needed to repeat the run.
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback

from shared.energy import EnergyMeter


class StepClock(TrainerCallback):
    """Sums the time of training steps and, within them, of the optimizer.

    Evaluation and saving do not count. Neither does the first step, in which libraries load kernels
    and the optimizer creates its state.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.step_seconds = 0.0
        self.optimizer_seconds = 0.0
        self.energy = EnergyMeter()
        self._mark: float | None = None
        self._optimizer_start = 0.0
        self._optimizer_last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the energy meter; it includes evaluations during training."""
        self.energy.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop the energy meter."""
        self.energy.stop()

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

    def steps_per_second(self) -> float | None:
        """Return the training speed, or None before the second step."""
        return (self.steps - 1) / self.step_seconds if self.steps > 1 else None

    def optimizer_share(self) -> float | None:
        """Return the optimizer's share of the step time, or None before the second step."""
        return self.optimizer_seconds / self.step_seconds if self.steps > 1 else None


def now() -> float:
    """Return the time, after waiting for work that an accelerator still has queued."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of optimizer state that this process holds.

    Counts storage rather than entries: under ZeRO some placeholders repeat a single zero.
    """
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.untyped_storage().nbytes() for tensor in local)


def curve(history: list[dict[str, Any]], **keys: str) -> list[dict[str, Any]]:
    """Return the logged values as a list of steps.

    A resumed run evaluates the step it resumes from a second time; one value is kept.

    Args:
        history: the Trainer's ``log_history``.
        **keys: name in the result and key in the log, e.g. ``loss="eval_loss"``. Entries without
            the first key are left out; other keys may be missing.
    """
    first = next(iter(keys.values()))
    by_step = {entry["step"]: entry for entry in history if first in entry}
    return [
        {"step": step, **{name: entry[key] for name, key in keys.items() if key in entry}}
        for step, entry in sorted(by_step.items())
    ]


def run_results(trainer: Trainer, clock: StepClock) -> dict[str, Any]:
    """Return the facts of the finished training; the caller adds model, data and metrics."""
    args, share = trainer.args, clock.optimizer_share()
    return {
        "optim": str(getattr(args.optim, "value", args.optim)),
        "optim_args": args.optim_args,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "optimizer_share": round(share, 4) if share else None,
        "optimizer_state_bytes": state_bytes(trainer.optimizer),
        "cpu_seconds": clock.energy.cpu_seconds,
        "joules": clock.energy.joules,
        "training_arguments": args.to_dict(),
        "world_size": args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_muon": version("hf-muon"),
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON atomically, because a run may be killed while it writes."""
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf8")
    written.replace(path)
