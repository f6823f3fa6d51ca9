"""From the Trainer's arguments to our settings.

In: ``TrainingArguments``. Out: a :class:`~hf_muon.MuonConfig`. The Trainer's standard fields give
the defaults, ``optim_args`` overrides them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_muon.config import MuonConfig
from hf_muon.routing.survey import survey

if TYPE_CHECKING:
    from transformers import TrainingArguments


def config_from_arguments(args: TrainingArguments) -> MuonConfig:
    """Settings of a run that names the optimizer.

    ``learning_rate`` is Muon's, and also AdamW's unless ``adamw_lr`` is given; ``weight_decay``
    is that of both halves; ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are AdamW's.
    """
    return MuonConfig.from_optim_args(
        args.optim_args,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        adamw_betas=(args.adam_beta1, args.adam_beta2),
        adamw_eps=args.adam_epsilon,
    )


def with_target_modules(config: MuonConfig, args: TrainingArguments, model: Any) -> MuonConfig:
    """``optim_target_modules`` as an explicit choice of matrices; the rest keeps its routes."""
    targets = args.optim_target_modules
    if not targets or targets == "all-linear" or not isinstance(model, nn.Module):
        return config
    from transformers.trainer_utils import check_target_module_exists

    chosen = tuple(
        f"^{re.escape(candidate.name)}$"
        for candidate in survey(model).candidates
        if len(candidate.shape) >= 2
        and check_target_module_exists(targets, ".".join(candidate.path))
    )
    if not chosen:
        raise ValueError(f"optim_target_modules={targets!r} matches no trainable matrix.")
    return dataclasses.replace(config, muon_params=config.muon_params + chosen)
