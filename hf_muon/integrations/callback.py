"""What every run by name needs from the Trainer's events.

In: the events of a Trainer. Out: settings checked before training starts, the learning rate of the
AdamW half in the logs, ``muon_report.json`` in the output folder and in each checkpoint. For other
optimizers the callback does nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_muon.integrations.arguments import config_from_arguments, with_target_modules
from hf_muon.integrations.deepspeed import check_deepspeed
from hf_muon.integrations.log_values import take_waiting
from hf_muon.integrations.names import is_ours
from hf_muon.integrations.report import find_muon, write_report
from hf_muon.routing import route

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
        check_deepspeed()
        model = kwargs.get("model")
        config = with_target_modules(config_from_arguments(args), args, model)
        if isinstance(model, nn.Module) and route(model, config).adamw:
            config.adamw_group()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report, or say that another optimizer trains than the one that was named."""
        if find_muon(kwargs.get("optimizer")) is not None:
            self._write_report(kwargs.get("optimizer"), state, Path(args.output_dir or "."))
        elif is_ours(args.optim):
            logger.warning(
                "optim=%r was asked for, but the Trainer was given another optimizer: %s trains.",
                str.__str__(args.optim),
                type(kwargs.get("optimizer")).__name__,
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report beside the weights it belongs to."""
        checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # A hyper-parameter search saves each trial in a folder of its own.
        folder = Path(args.output_dir or ".", state.trial_name or "", checkpoint)
        if folder.is_dir():
            self._write_report(kwargs.get("optimizer"), state, folder)

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
        optimizer = find_muon(kwargs.get("optimizer"))
        if logs is None or optimizer is None:
            return
        values = take_waiting(optimizer)
        if "learning_rate" in logs and self.adamw_lr is not None:  # the Trainer's: of group 0
            values["adamw/lr"] = self.adamw_lr
        logs.update(values)
        state.log_history[-1].update(values)

    @staticmethod
    def _write_report(wrapped: object, state: TrainerState, folder: Path) -> None:
        optimizer = find_muon(wrapped)
        if optimizer is not None and state.is_world_process_zero:
            write_report(optimizer, folder)
