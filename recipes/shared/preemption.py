"""Runs that a signal stops save a checkpoint first, and resume from it exactly.

In: a ``Trainer``, and the checkpoint to resume from. Out: whether training finished; if not, a
checkpoint of the step that was running, and a line that says where it is. Schedulers send SIGTERM,
or SIGUSR1 (SLURM's ``--signal``), some time before they end a job.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1


class AlreadyTrained(Exception):
    """The checkpoint is after the last step; the Trainer (transformers 5.23) would do one more."""


class StopOnSignal(TrainerCallback):
    """Saves and stops at the end of a step in which any of the processes got a signal.

    The processes agree after every step and evaluation with an all-reduce of one number, because a
    signal may reach them at different moments, or only one of them. transformers' own callback for
    SIGTERM (5.23), ``enable_jit_checkpoint``, acts in each process separately, three seconds after
    the signal: ranks that save sharded checkpoints would wait for each other in different steps.
    """

    def __init__(self) -> None:
        self.received = 0
        self.stopped_by: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._stepped = self._saved = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Install signal handlers, unless nothing is left to train."""
        if state.global_step >= state.max_steps:
            raise AlreadyTrained
        if threading.current_thread() is threading.main_thread():  # Python requires it
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save instead of evaluating if a signal came during the step."""
        self._stepped = True
        if self._stop(args, state, control):
            control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save without another step if a signal came during the evaluation.

        The evaluation before the first step leaves nothing to save.
        """
        if self._stepped:
            self._stop(args, state, control)

    def on_save(self, *_: Any, **__: Any) -> None:
        """Note whether the final checkpoint was saved."""
        self._saved = self.stopped_by is not None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save if ``save_strategy=best`` did not do so after an evaluation; never twice."""
        if self.stopped_by is not None:
            control.should_evaluate = False
            control.should_save = not self._saved

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Restore the signal handlers."""
        self._stepped = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _stop(self, args: Any, state: Any, control: Any) -> bool:
        """Ask all processes whether one of them got a signal, and stop if so."""
        number = largest_of_all(self.received, args.device)
        if not number or state.global_step >= state.max_steps:  # training ends here anyway
            return False
        self.stopped_by = signal.Signals(number).name
        control.should_save = control.should_training_stop = True
        if args.save_total_limit == 1:
            args.save_total_limit = 2  # with 1 the Trainer would keep only the best checkpoint
        return True

    def _note(self, number: int, _: Any) -> None:
        self.received = number


def largest_of_all(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers."""
    if not torch.distributed.is_initialized():
        return number
    numbers = torch.tensor(number, device=device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers)


def train(trainer: Trainer, checkpoint: str | None) -> bool:
    """Train, and return whether all steps were done; if not, print where to resume.

    Args:
        trainer: a Trainer that has not trained yet.
        checkpoint: folder to resume from, or None to start.
    """
    stop = StopOnSignal()
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except AlreadyTrained:
        trainer.is_in_train = False
        return True
    if stop.stopped_by is None:
        return True
    if trainer.is_world_process_zero():
        state, folder = trainer.state, Path(trainer.args.output_dir)
        saved = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        print(
            f"stopped by {stop.stopped_by} after step {state.global_step} of {state.max_steps}; "
            f"saved {saved}. The same command with --resume_from_checkpoint last goes on from it.",
            flush=True,
        )
    return False
