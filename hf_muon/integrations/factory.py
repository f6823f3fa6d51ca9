"""From a model, or from groups of its parameters, to the optimizer.

In: a model and settings, and any groups that a client built. Out: a :class:`~hf_muon.Muon` whose
groups follow the routes. The factory class is what ``Trainer(optimizer_cls_and_kwargs=…)``,
axolotl, and trainers with groups of their own call.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from hf_muon.config import MuonConfig
from hf_muon.integrations.arguments import forget, model_of
from hf_muon.integrations.deepspeed import check_deepspeed
from hf_muon.integrations.model_card import describe_in_model_cards
from hf_muon.integrations.untrained import untrained, watch
from hf_muon.optimizer import Muon
from hf_muon.routing import RoutePlan, route
from hf_muon.routing.route import as_groups, with_routing

logger = logging.getLogger(__name__)


def create_muon_optimizer(
    model: nn.Module,
    config: MuonConfig | None = None,
    *,
    groups: Iterable[Any] | None = None,
    replicate_group: ProcessGroup | str | None = None,
    **overrides: Any,
) -> Muon:
    """Route the parameters of a model and build the optimizer for them.

    Args:
        model: Any ``nn.Module``; parameters that need no gradient are left out.
        config: Settings; ``lr`` is required, here or in ``overrides``.
        groups: Groups of the model's parameters with an ``lr`` or ``weight_decay`` of their own.
            Each is split by the routes. Default: all parameters, with the settings of the run.
        replicate_group: The ranks that hold copies of plain tensors, as under DDP; see
            :class:`~hf_muon.Muon`.
        **overrides: Fields of :class:`~hf_muon.MuonConfig` that replace those of ``config``.

    Returns:
        The optimizer. ``optimizer.routes`` is the routing table as plain data.

    Raises:
        ValueError: A setting is not allowed, or nothing in the model is a hidden matrix.

    Example:
        >>> optimizer = create_muon_optimizer(model, lr=1e-3, weight_decay=0.1)
    """
    config = dataclasses.replace(config or MuonConfig(), **overrides)
    return _optimizer(model, route(model, config), config, groups, replicate_group)


def _optimizer(
    model: nn.Module | None,
    plan: RoutePlan,
    config: MuonConfig,
    given: Iterable[Any] | None,
    replicate_group: ProcessGroup | str | None,
) -> Muon:
    config = with_routing(config, plan.config)
    groups = plan.param_groups(config, given)
    optimizer = Muon(groups, replicate_group=replicate_group, config=config)
    if given is not None:
        plan = plan.only({name for group in groups for name, _ in group["params"]})
    optimizer.routes = plan.to_dict()
    if model is not None:
        watched = watch(optimizer, model)
        if given is not None:  # another optimizer may train what the groups leave out
            watched.begin(model, untrained(model, optimizer))
    return optimizer


class MuonOptimizerFactory:
    """Builds the optimizer: an instance builds it from a model, the class itself from groups.

    The Trainer makes an instance and calls it with the model. Trainers that build groups of their
    own call the class like any optimizer class; the groups are split by the routes, and keep their
    learning rates and decay. The routes are those of ``plan``, or else those of the model that
    holds the parameters and belongs to a Trainer with ``optim="muon"``.

    Example:
        >>> Trainer(..., optimizer_cls_and_kwargs=(MuonOptimizerFactory, {"lr": 1e-3}))
        >>> create_loraplus_optimizer(
        ...     model, MuonOptimizerFactory, lr=1e-3, loraplus_lr_ratio=16, plan=route(model)
        ... )
    """

    def __new__(cls, params: Iterable[Any] | None = None, **settings: Any) -> Any:
        """Return an instance; given parameters, return a :class:`~hf_muon.Muon`.

        Args:
            params: Parameters, or groups of them.
            **settings: Fields of :class:`~hf_muon.MuonConfig`; ``plan``: the parameters' routes.

        Raises:
            ValueError: The parameters belong to no known model.
        """
        return super().__new__(cls) if params is None else _built(None, params, settings)

    def __call__(self, model: nn.Module, *ignored: Any, **settings: Any) -> Muon:
        """Build the optimizer.

        Args:
            model: The model to train.
            *ignored: Further arguments that some trainers pass.
            **settings: Fields of :class:`~hf_muon.MuonConfig`; strings are converted.
        """
        settings.pop("training_args", None)  # axolotl passes it by name
        given = settings.pop("optimizer_dict", None)  # groups from sentence-transformers
        return _built(model, given, settings)


def _built(model: nn.Module | None, given: Iterable[Any] | None, settings: dict[str, Any]) -> Muon:
    describe_in_model_cards()
    forget(model)
    plan: RoutePlan | None = settings.pop("plan", None)
    config = _config(settings)
    check_deepspeed(config)
    if given is None:
        if plan is None or model is None or not plan.fits(model):
            _warn_of_losses(model)
            plan = None
    else:
        given = as_groups(given)
        if any("algorithm" in group for group in given):
            return Muon(given, replicate_group="world", config=config)
    if plan is None:
        model = model or _model_of(given)
        plan = route(model, config)
    # A Trainer's plain tensors are copies on all ranks: it wraps them in DDP.
    return _optimizer(model, plan, config, given, "world")


def _config(settings: dict[str, Any]) -> MuonConfig:
    """Return the settings as already parsed, or from what a client passes."""
    read = settings.pop("config", None)
    if not isinstance(read, MuonConfig):
        return MuonConfig.from_mapping(settings if read is None else {**settings, "config": read})
    same = all(getattr(read, name, ...) == value for name, value in settings.items())
    return read if same else MuonConfig.from_mapping({**read.to_dict(), **settings})


def _model_of(groups: Iterable[dict[str, Any]] | None) -> nn.Module:
    model = model_of(p for group in groups or () for p in group["params"])
    if model is None:
        raise ValueError(
            "Parameters alone do not say which of them are hidden matrices, and no Trainer with "
            "optim='muon' has a model that holds these. Pass the model to "
            "get_optimizer_cls_and_kwargs(args, model), or plan=hf_muon.route(model)."
        )
    return model


def _warn_of_losses(model: nn.Module | None) -> None:
    """Warn that a factory cannot see the parameters in sentence-transformers' losses."""
    if any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__):
        logger.warning(
            "optimizer_cls_and_kwargs leaves out what the losses of sentence-transformers hold "
            "themselves, such as a classifier. Choose optim='muon', which trains it."
        )
