"""``optim="muon"`` for the Hugging Face Trainer.

In: a call of :func:`register`. Out: optimizer names that ``TrainingArguments`` accepts, the
handler behind them, one callback in every Trainer, and a correct line in model cards.
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
    """Make ``optim="muon"`` a valid name, and ``"hf_muon"``, ``"normuon"`` and ``"adamuon"``.

    Call it before ``TrainingArguments`` or ``HfArgumentParser`` are built, or ``import
    hf_muon.auto``, which calls it. Calling it again changes nothing.

    Raises:
        ImportError: transformers is older than 5.2, or has renamed its handler table.
    """
    add_names(handle_muon)
    install_callback()
    describe_in_model_cards()


def install_callback() -> None:
    """Give every Trainer built from now on our callback, before its reporters."""
    from transformers import trainer

    from hf_muon.integrations.callback import MuonCallback

    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if MuonCallback not in callbacks:
        callbacks.append(MuonCallback)


def handle_muon(context: OptimizerContext) -> tuple[type[MuonOptimizerFactory], dict[str, Any]]:
    """Return the factory and its keyword arguments; the Trainer calls this for our names."""
    found = prepare(context.args, context.model)
    forget(context.model)
    return MuonOptimizerFactory, {"lr": found.config.lr, "config": found.config, "plan": found.plan}
