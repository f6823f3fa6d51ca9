"""The callback for runs with ``optim="muon"``.

In: the events of a Trainer. Out: settings checked before training starts; a line that says what
Muon trains; warnings about parameters that are not trained and state that is not resumed; the
learning rates in the logs, without factors; ``muon_report.json`` in the output folder and in each
checkpoint. For other optimizers the callback does nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_muon.integrations.arguments import config_from_arguments, prepare
from hf_muon.integrations.deepspeed import check_deepspeed
from hf_muon.integrations.log_values import take_waiting
from hf_muon.integrations.names import is_ours
from hf_muon.integrations.notice import first_line, say
from hf_muon.integrations.report import find_muon, rate_of, write_report
from hf_muon.integrations.untrained import watch
from hf_muon.optimizer import Muon
from hf_muon.optimizer.auto_momentum import momenta_in_use

logger = logging.getLogger(__name__)


class MuonCallback(TrainerCallback):
    """Checks, warnings, learning rates and report; ``register()`` installs it in every Trainer."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise for wrong settings when the Trainer is constructed, before it prepares the data."""
        if not is_ours(args.optim):
            return
        model = kwargs.get("model")
        if isinstance(model, nn.Module) and not any(p.requires_grad for p in model.parameters()):
            config_from_arguments(args)  # evaluation needs no routes, and there are none
            return
        found = prepare(args, model)
        check_deepspeed(found.config)
        if found.plan is not None and found.plan.adamw:
            found.config.adamw_group()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report and say what Muon trains, or warn that another optimizer trains."""
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
        """Warn if a resumed run starts with a fresh schedule or without momentum."""
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

    def on_epoch_end(self, *_: Any, **kwargs: Any) -> None:
        """Warn about parameters that have become trainable."""
        self._look_for_untrained(kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report beside the saved weights."""
        checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # A hyper-parameter search saves each trial in a folder of its own.
        folder = Path(args.output_dir or ".", state.trial_name or "", checkpoint)
        if folder.is_dir():
            optimizer = find_muon(kwargs.get("optimizer"))
            if optimizer is not None and state.is_world_process_zero:
                write_report(optimizer, folder)

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        """Note learning rates, of parameters without a factor, before the scheduler changes them.

        The Trainer does the same with the rate of the first group, whatever its factor.
        """
        self.rates, optimizer = {}, find_muon(kwargs.get("optimizer"))
        if optimizer is None:
            return
        rates = {"adamw/lr": rate_of("adamw", optimizer)}
        if "lr_multiplier" in optimizer.param_groups[0]:
            rates["learning_rate"] = rate_of("muon", optimizer)
        self.rates = {name: rate for name, rate in rates.items() if rate is not None}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add learning rates, the momentum in use, and values that others have left for the log."""
        if logs is None:
            return
        optimizer = find_muon(kwargs.get("optimizer"))
        values = {**chosen_momenta(optimizer), **take_waiting(kwargs.get("optimizer"))}
        if "learning_rate" in logs:
            values |= self.rates
        if values:
            logs.update(values)
            state.log_history[-1].update(values)
        self._look_for_untrained(kwargs)

    @staticmethod
    def _look_for_untrained(of_trainer: dict[str, Any], begins: bool = False) -> None:
        """Warn about parameters that need a gradient but are in no group."""
        model, optimizer = of_trainer.get("model"), find_muon(of_trainer.get("optimizer"))
        if isinstance(model, nn.Module) and optimizer is not None:
            watched = watch(optimizer, model)
            if begins:
                watched.begin(model)
            watched.look(optimizer)


def chosen_momenta(optimizer: Muon | None) -> dict[str, float]:
    """Return the smallest, median and largest β over matrices that ``momentum="auto"`` uses now.

    The result is empty for other momentum.
    """
    states = optimizer.state.values() if optimizer is not None else []
    scores = [state["momentum_scores"] for state in states if "momentum_scores" in state]
    found = sorted(beta for one in scores for beta in momenta_in_use(one))
    if not found:
        return {}
    shown = {"min": found[0], "median": found[len(found) // 2], "max": found[-1]}
    return {f"momentum/{name}": beta for name, beta in shown.items()}
