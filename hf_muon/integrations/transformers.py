"""``optim="muon"`` for the Hugging Face Trainer.

In: a call of :func:`register`. Out: two optimizer names that ``TrainingArguments`` accepts, the
handler behind them, one callback in every Trainer, and a truthful line in model cards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_muon.integrations.arguments import forget, prepare
from hf_muon.integrations.factory import MuonOptimizerFactory
from hf_muon.integrations.model_card import describe_in_model_cards
from hf_muon.integrations.names import add_names

if TYPE_CHECKING:
    from transformers.trainer_optimizer import OptimizerContext


def register() -> None:
    """Make ``optim="muon"`` (and ``"hf_muon"``) a valid name.

    Call it before ``TrainingArguments`` or ``HfArgumentParser`` are built; ``import hf_muon.auto``
    does. Calling it again changes nothing.

    Raises:
        ImportError: transformers is older than 5.2, or has renamed its handler table.
    """
    add_names(handle_muon)
    install_callback()
    describe_in_model_cards()


def install_callback() -> None:
    """Give every Trainer that is made from now on our callback, ahead of its reporters."""
    from transformers import trainer

    from hf_muon.integrations.callback import MuonCallback

    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if MuonCallback not in callbacks:
        callbacks.append(MuonCallback)


def handle_muon(context: OptimizerContext) -> tuple[type[MuonOptimizerFactory], dict[str, Any]]:
    """What the Trainer calls for our names: the factory and its keyword arguments, fresh."""
    found = prepare(context.args, context.model)
    forget(context.model)
    return MuonOptimizerFactory, {"lr": found.config.lr, "config": found.config, "plan": found.plan}
