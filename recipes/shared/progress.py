"""Console output during training: a bar with the losses, or a short line per log.

In: a ``Trainer``. Out: callbacks that replace those that print every log in full.
"""

from __future__ import annotations

from typing import Any

import datasets
import transformers
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


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

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Show no second bar: the evaluations along the way are short."""


class LogLines(TrainerCallback):
    """Prints a short line per log, for runs without a progress bar."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print the step and the losses that were logged."""
        losses = shown_losses(logs or {})
        if state.is_world_process_zero and losses:
            said = ", ".join(f"{name} {loss}" for name, loss in losses.items())
            print(f"step {state.global_step}/{state.max_steps}: {said}", flush=True)


def shown_losses(logs: dict[str, Any]) -> dict[str, str]:
    """Return the losses of a log, and the reward of GRPO, under short names."""
    names = {"loss": "loss", "reward": "reward", "eval_loss": "validation"}
    return {short: f"{float(logs[name]):.3f}" for name, short in names.items() if name in logs}


def use_quiet_progress(trainer: Trainer) -> None:
    """Show the losses in the progress bar, or in short lines, instead of every log in full."""
    for default in (ProgressCallback, PrinterCallback):
        trainer.pop_callback(default)
    trainer.add_callback(LogLines if trainer.args.disable_tqdm else QuietProgress)
