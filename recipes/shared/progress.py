"""Console output during training: a bar with the losses, or a short line per log.

In: a ``Trainer``. Out: callbacks that replace those that print every log in full. Neither is silent
for long: a large evaluation shows its own bar, or prints a line every few seconds.
"""

from __future__ import annotations

import time
from typing import Any

import datasets
import transformers
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

# Evaluations of more than LONG batches have a bar; PATIENCE is the longest silence in seconds.
LONG, PATIENCE = 8, 8.0


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of the output."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


class QuietProgress(ProgressCallback):
    """The Trainer's progress bar, with the losses in the bar instead of a line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the last training and validation loss."""
        if self.training_bar is not None and logs:
            self._shown = {**getattr(self, "_shown", {}), **shown_losses(logs)}
            self.training_bar.set_postfix(self._shown)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Show a second bar if an evaluation is long; evaluations during training are short."""
        if has_length(eval_dataloader) and len(eval_dataloader) > LONG:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader)


class LogLines(TrainerCallback):
    """Prints a short line per log, and one if nothing was printed for some seconds."""

    def __init__(self) -> None:
        self._said = time.monotonic()
        self._evaluated = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print the step and the losses that were logged."""
        losses = shown_losses(logs or {})
        if state.is_world_process_zero and losses:
            said = ", ".join(f"{name} {loss}" for name, loss in losses.items())
            self._say(f"step {state.global_step}/{state.max_steps}: {said}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Print the step if nothing was printed for some seconds."""
        if state.is_world_process_zero and self._is_overdue():
            self._say(f"step {state.global_step}/{state.max_steps}")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        """Print the progress of an evaluation if nothing was printed for some seconds."""
        self._evaluated += 1
        if state.is_world_process_zero and self._is_overdue():
            of = f"/{len(eval_dataloader)}" if has_length(eval_dataloader) else ""
            self._say(f"evaluated {self._evaluated}{of} batches")

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Reset the count of batches for the next evaluation."""
        self._evaluated = 0

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._said > PATIENCE

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(text, flush=True)


def has_length(loader: Any) -> bool:
    """Return whether the number of batches is known; for a stream it is not."""
    try:
        return len(loader) >= 0
    except TypeError:
        return False


def shown_losses(logs: dict[str, Any]) -> dict[str, str]:
    """Return the losses of a log, and the reward of GRPO, under short names."""
    names = {"loss": "loss", "reward": "reward", "eval_loss": "validation"}
    return {short: f"{float(logs[name]):.3f}" for name, short in names.items() if name in logs}


def use_quiet_progress(trainer: Trainer) -> None:
    """Show the losses in the progress bar, or in short lines, instead of every log in full."""
    for default in (ProgressCallback, PrinterCallback):
        trainer.pop_callback(default)
    trainer.add_callback(LogLines if trainer.args.disable_tqdm else QuietProgress)
