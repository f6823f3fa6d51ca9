"""A ``Trainer`` subclass with learning rates that decrease from the last layer to the first.

In: ``python layerwise.py [--decay 0.8] [--optim muon] [--learning_rate 0.005] ...``: ``Settings``
and the stock ``TrainingArguments``. Out: the held-out loss before and after, a sample, and in
``--output_dir`` the model and ``muon_report.json``.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from bytes_llama import BATCH, build_model, held_out_loss, rows, sample
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

DEFAULTS = {
    "output_dir": "runs/ecosystem/layerwise",
    "optim": "muon",
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
    "max_steps": 60,
    "per_device_train_batch_size": BATCH,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class Settings:
    """The subclass's own arguments."""

    decay: float = field(default=0.8, metadata={"help": "Rate of a layer by that of the next."})


class LayerwiseTrainer(Trainer):
    """Groups parameters by layer, for whichever optimizer is named.

    hf_muon splits each group by its routes, and keeps the group's rate and weight decay.
    """

    def __init__(self, *args: Any, decay: float, **kwargs: Any) -> None:
        self.decay = decay
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make a group for each layer, and one for the rest."""
        cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        last = self.model.config.num_hidden_layers - 1
        groups: dict[int, list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            layer = re.search(r"layers\.(\d+)\.", name)
            groups.setdefault(int(layer[1]) if layer else last, []).append(parameter)
        self.optimizer = cls(
            [
                {"params": held, "lr": self.args.learning_rate * self.decay ** (last - layer)}
                for layer, held in groups.items()
            ],
            **settings,
        )
        return self.optimizer


def main(argv: list[str]) -> tuple[float, float]:
    """Train, and return the held-out loss before and after."""
    parser = HfArgumentParser((Settings, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    settings, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    data = [
        {"input_ids": row, "labels": row} for step in range(args.max_steps) for row in rows(step)
    ]
    trainer = LayerwiseTrainer(
        model=build_model(), args=args, train_dataset=data, decay=settings.decay
    )
    before = held_out_loss(trainer.model)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = held_out_loss(trainer.model)
    trainer.save_model()
    print(f"{sample(trainer.model)}\nheld-out loss {before:.3f} → {after:.3f}")
    return before, after


if __name__ == "__main__":
    main(sys.argv[1:])
