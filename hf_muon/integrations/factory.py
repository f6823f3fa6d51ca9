"""From a model to its optimizer.

In: a model and settings. Out: a :class:`~hf_muon.Muon` whose groups follow the routes. The factory
is the form that ``Trainer(optimizer_cls_and_kwargs=…)`` and axolotl call.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from hf_muon.config import MuonConfig
from hf_muon.integrations.deepspeed import check_deepspeed
from hf_muon.integrations.model_card import describe_in_model_cards
from hf_muon.optimizer import Muon
from hf_muon.routing import route

logger = logging.getLogger(__name__)


def create_muon_optimizer(
    model: nn.Module,
    config: MuonConfig | None = None,
    *,
    replicate_group: ProcessGroup | str | None = None,
    **overrides: Any,
) -> Muon:
    """Route the parameters of a model and build the optimizer for them.

    Args:
        model: Any ``nn.Module``; parameters that need no gradient are left out.
        config: Settings; ``lr`` is required, here or in ``overrides``.
        replicate_group: The ranks that hold copies of plain tensors, as under DDP; see
            :class:`~hf_muon.Muon`.
        **overrides: Fields of :class:`~hf_muon.MuonConfig` that replace those of ``config``.

    Returns:
        The optimizer. ``optimizer.routes`` is the routing table as plain data.

    Raises:
        ValueError: A setting that is not allowed, or nothing in the model is a hidden matrix.

    Example:
        >>> optimizer = create_muon_optimizer(model, lr=1e-3, weight_decay=0.1)
    """
    config = dataclasses.replace(config or MuonConfig(), **overrides)
    plan = route(model, config)
    settings: dict[str, Any] = config.to_dict()
    optimizer = Muon(plan.param_groups(config), replicate_group=replicate_group, **settings)
    optimizer.routes = plan.to_dict()
    totals = plan.totals()
    logger.info(
        "Muon trains %d matrices (%d parameters), AdamW %d tensors (%d parameters).",
        totals["muon_matrices"],
        totals["muon_parameters"],
        totals["adamw_tensors"],
        totals["adamw_parameters"],
    )
    return optimizer


class MuonOptimizerFactory:
    """Zero-argument class whose instances build the optimizer from a model.

    Example:
        >>> Trainer(..., optimizer_cls_and_kwargs=(MuonOptimizerFactory, {"lr": 1e-3}))
    """

    def __call__(self, model: nn.Module, *ignored: Any, **settings: Any) -> Muon:
        """Build the optimizer.

        Args:
            model: The model to train.
            *ignored: Further arguments that some trainers pass, such as their own.
            **settings: Fields of :class:`~hf_muon.MuonConfig`; strings are converted.
        """
        settings.pop("training_args", None)  # axolotl passes it by name
        describe_in_model_cards()
        check_deepspeed()
        config = MuonConfig.from_mapping(settings)
        # A Trainer's plain tensors are copies on all ranks: it wraps them in DDP.
        return create_muon_optimizer(model, config, replicate_group="world")
