"""Post-training with TRL's trainers and Muon: the part that all methods share.

In: the :class:`Method` of a script in this folder, and ``[config.yaml] [--name value ...]``, which
are ``Settings`` and TRL's own configuration. Out: in ``--output_dir`` the model (or its adapter),
``results.json`` with the held-out measures before and after, and ``muon_report.json``; on the
screen both measures and samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import datasets
from models import open_model
from shared import compared, hub
from shared.arguments import read
from shared.processes import check_world_size
from shared.progress import quiet_libraries
from transformers import Trainer, TrainingArguments, set_seed

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

HERE = Path(__file__).parent
PACKAGED = 1800


@dataclass
class Settings(hub.Rows):
    """The model, whether adapters or all weights are trained, and the rows."""

    model: str = field(
        default="tiny",
        metadata={"help": "tiny (a random LLaMA), smollm2, a folder, or a Hub model (owner/name)."},
    )
    r: int | None = field(
        default=None, metadata={"help": "Rank of LoRA adapters; by default all weights train."}
    )


@dataclass(frozen=True)
class Method:
    """What differs between TRL's methods.

    Attributes:
        config: TRL's class of arguments.
        trainer: TRL's trainer.
        packaged: Makes the packaged rows, given the number to train on and to hold out.
        measures: For each measure, its name in ``results.json`` and TRL's name of it.
        samples: Given the trained Trainer and held-out rows, returns lines that show its output.
        task: PEFT's name of the task.
        more: Given the model and whether adapters are trained, returns further trainer arguments.
    """

    config: type[TrainingArguments]
    trainer: type[Trainer]
    packaged: Callable[[int, int], hub.Parts]
    measures: Mapping[str, str]
    samples: Callable[[Trainer, datasets.Dataset], list[str]]
    task: str = "CAUSAL_LM"
    more: Callable[[Any, bool], dict[str, Any]] = lambda model, adapted: {}

    def main(self, argv: list[str]) -> dict[str, Any] | None:
        """Train, and return the results; see :func:`shared.compared.train`."""
        settings, args = read(argv, (Settings, self.config), HERE).made()
        check_world_size(args)
        quiet_libraries()
        set_seed(args.seed)  # the tiny model, a new head and adapters are random
        train, held_out = settings.parts(self.packaged, PACKAGED)
        model, tokenizer, adapter = open_model(settings.model, settings.r, self.task, train)
        trainer = self.trainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=adapter,
            **self.more(model, adapter is not None),
        )

        def measured() -> dict[str, float]:
            found = trainer.evaluate()
            return {name: found[f"eval_{key}"] for name, key in self.measures.items()}

        return compared.train(
            trainer,
            measured,
            lambda: self.samples(trainer, held_out),
            settings=vars(settings),
            train_rows=len(train),
            validation_rows=len(held_out),
        )

    def run(self) -> None:
        """Train with the command line's arguments."""
        compared.ended(self.main)
