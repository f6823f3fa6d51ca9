"""From the Trainer's arguments to the settings and the routes of its model, once per run.

In: ``TrainingArguments`` and a model. Out: a :class:`~hf_muon.MuonConfig` and a
:class:`~hf_muon.RoutePlan`. The Trainer's standard fields give the defaults, ``optim_args``
overrides them. Everything is checked when the Trainer is built; the result is reused when it
creates the optimizer, if arguments and parameters are still the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hf_muon.config import MuonConfig
from hf_muon.integrations.names import PRESETS
from hf_muon.routing import RoutePlan, route
from hf_muon.routing.survey import shape_of, trainable

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Settings and routes of a run.

    Attributes:
        config: The settings.
        plan: The routes; None if no model is known.
        asked: The fields of the arguments that they depend on.
    """

    config: MuonConfig
    plan: RoutePlan | None
    asked: tuple[Any, ...]


# Models of Trainers that use our optimizer; None once the optimizer is being created.
_prepared: WeakKeyDictionary[nn.Module, Prepared | None] = WeakKeyDictionary()

_FIELDS = (
    "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "optim_target_modules",
)  # fmt: skip


def prepare(args: TrainingArguments, model: object) -> Prepared:
    """Read the settings of a run and route its model, or return the earlier result if it is valid.

    Raises:
        ValueError: A setting or a pattern is not allowed.
    """
    asked = tuple(getattr(args, name) for name in _FIELDS)
    if not isinstance(model, nn.Module):
        if args.optim_target_modules not in (None, "all-linear"):
            raise ValueError(
                f"optim_target_modules={args.optim_target_modules!r} names modules of a model that "
                "is not known: pass it to get_optimizer_cls_and_kwargs(args, model)."
            )
        return Prepared(config_from_arguments(args), None, asked)
    known = _prepared.get(model)
    if known is None or known.asked != asked or not (known.plan and known.plan.fits(model)):
        config = _with_target_modules(config_from_arguments(args), args, model)
        known = _prepared[model] = Prepared(config, route(model, config), asked)
    return known


def forget(model: object) -> None:
    """Drop the plan of a model: it holds parameters, which FSDP2 is about to replace."""
    if isinstance(model, nn.Module) and model in _prepared:
        _prepared[model] = None


def model_of(parameters: Iterable[Tensor]) -> nn.Module | None:
    """Return the model of a Trainer with our optimizer that holds all the given parameters."""
    wanted = set(map(id, parameters))
    return next((m for m in list(_prepared) if wanted <= set(map(id, m.parameters()))), None)


def config_from_arguments(args: TrainingArguments) -> MuonConfig:
    """Return the settings of a run that selects the optimizer by name.

    ``learning_rate`` is Muon's, and also AdamW's unless ``adamw_lr`` is given; ``weight_decay``
    is that of both halves; ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are AdamW's. The
    names ``normuon`` and ``adamuon`` set ``rescale``.
    """
    return MuonConfig.from_optim_args(
        args.optim_args,
        **PRESETS.get(str.__str__(args.optim), {}),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        adamw_betas=(args.adam_beta1, args.adam_beta2),
        adamw_eps=args.adam_epsilon,
    )


def _with_target_modules(
    config: MuonConfig, args: TrainingArguments, model: nn.Module
) -> MuonConfig:
    """Turn ``optim_target_modules`` into ``muon_params``; other parameters keep their routes."""
    targets = args.optim_target_modules
    if not targets or targets == "all-linear":
        return config
    from transformers.trainer_utils import check_target_module_exists

    chosen = tuple(
        f"^{re.escape(name)}$"
        for name, parameter in trainable(model)
        if len(shape_of(parameter)) >= 2
        and check_target_module_exists(targets, name.rpartition(".")[0])
    )
    if not chosen:
        raise ValueError(f"optim_target_modules={targets!r} matches no trainable matrix.")
    return dataclasses.replace(config, muon_params=config.muon_params + chosen)
