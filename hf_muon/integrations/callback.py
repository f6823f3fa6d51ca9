"""What every run by name needs from the Trainer's events.

In: the events of a Trainer. Out: settings checked before training starts, a line that says what
Muon trains, warnings of what would not be trained or not be continued, the learning rate of the
AdamW half in the logs, ``muon_report.json`` in the output folder and in each checkpoint. For other
optimizers the callback does nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_muon.integrations.arguments import prepare
from hf_muon.integrations.deepspeed import check_deepspeed
from hf_muon.integrations.log_values import take_waiting
from hf_muon.integrations.names import is_ours
from hf_muon.integrations.notice import first_line, say
from hf_muon.integrations.report import find_muon, write_report
from hf_muon.integrations.untrained import watch
from hf_muon.optimizer import Muon
from hf_muon.optimizer.auto_momentum import momenta_in_use

logger = logging.getLogger(__name__)


class MuonCallback(TrainerCallback):
    """Checks, learning rates and report; ``hf_muon.register()`` installs it in every Trainer."""

    def __init__(self) -> None:
        self.adamw_lr: float | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fail at construction, not after the data is prepared, if settings are wrong."""
        if not is_ours(args.optim):
            return
        found = prepare(args, kwargs.get("model"))
        check_deepspeed(found.config)
        if found.plan is not None and found.plan.adamw:
            found.config.adamw_group()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report, and say what trains: Muon, or an optimizer that nobody named."""
        optimizer = find_muon(kwargs.get("optimizer"))
        if optimizer is not None:
            if state.is_world_process_zero:
                say(first_line(optimizer, write_report(optimizer, Path(args.output_dir or "."))))
            self._look_for_untrained(kwargs, begins=True)
        elif is_ours(args.optim):
            logger.warning(
                "optim=%r was asked for, but the Trainer was given another optimizer: %s trains.",
                str.__str__(args.optim),
                type(kwargs.get("optimizer")).__name__,
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn where a run goes on and its schedule, or its momentum, begins anew."""
        scheduler, optimizer = kwargs.get("lr_scheduler"), find_muon(kwargs.get("optimizer"))
        if optimizer is None or not state.global_step:
            return
        if not optimizer.state:
            logger.warning(
                "Training goes on at step %d without the state of the optimizer: the checkpoint "
                "has no optimizer.pt, or an empty one, or no scheduler.pt beside it. Momentum "
                "begins at zero.",
                state.global_step,
            )
        if isinstance(scheduler, LambdaLR) and scheduler.last_epoch == 0:  # callbacks have begun
            logger.warning(
                "Training goes on at step %d with a schedule that begins anew: the Trainer reads "
                "scheduler.pt only beside optimizer.pt. To keep the schedule, let a callback call "
                "lr_scheduler.step() as often in on_train_begin.",
                state.global_step,
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for parameters that have become trainable."""
        self._look_for_untrained(kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report beside the weights it belongs to."""
        checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # A hyper-parameter search saves each trial in a folder of its own.
        folder = Path(args.output_dir or ".", state.trial_name or "", checkpoint)
        if folder.is_dir():
            optimizer = find_muon(kwargs.get("optimizer"))
            if optimizer is not None and state.is_world_process_zero:
                write_report(optimizer, folder)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note AdamW's rate before the scheduler moves it, as the Trainer does for the first."""
        optimizer = find_muon(kwargs.get("optimizer"))
        groups = optimizer.param_groups if optimizer is not None else []
        rates = [float(group["lr"]) for group in groups if group["algorithm"] == "adamw"]
        self.adamw_lr = rates[0] if rates else None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``adamw/lr`` beside the Trainer's ``learning_rate``, and what others have left."""
        if logs is None:
            return
        optimizer = find_muon(kwargs.get("optimizer"))
        values = {**chosen_momenta(optimizer), **take_waiting(kwargs.get("optimizer"))}
        if "learning_rate" in logs and self.adamw_lr is not None:  # the Trainer's: of group 0
            values["adamw/lr"] = self.adamw_lr
        if values:
            logs.update(values)
            state.log_history[-1].update(values)
        self._look_for_untrained(kwargs)

    @staticmethod
    def _look_for_untrained(of_trainer: dict[str, Any], begins: bool = False) -> None:
        """Warn of parameters that need a gradient and that no group holds."""
        model, optimizer = of_trainer.get("model"), find_muon(of_trainer.get("optimizer"))
        if isinstance(model, nn.Module) and optimizer is not None:
            watched = watch(optimizer, model)
            if begins:
                watched.begin(model)
            watched.look(optimizer)


def chosen_momenta(optimizer: Muon | None) -> dict[str, float]:
    """What ``momentum="auto"`` uses now: the smallest, the median and the largest β of a matrix."""
    states = optimizer.state.values() if optimizer is not None else []
    scores = [state["momentum_scores"] for state in states if "momentum_scores" in state]
    found = sorted(beta for one in scores for beta in momenta_in_use(one))
    if not found:
        return {}
    shown = {"min": found[0], "median": found[len(found) // 2], "max": found[-1]}
    return {f"momentum/{name}": beta for name, beta in shown.items()}
