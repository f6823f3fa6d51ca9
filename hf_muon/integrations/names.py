"""The names ``muon``, ``hf_muon``, ``normuon`` and ``adamuon`` among the Trainer's optimizers.

In: the enum ``OptimizerNames`` and the handler table of transformers. Out: new members and entries
in them. transformers has no hook for other packages' names (5.23), so members are added to the enum
at run time, as its metaclass would do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from importlib.metadata import version
from typing import Any, cast

logger = logging.getLogger(__name__)

# The default settings of each name; ``optim_args`` may override them.
PRESETS: dict[str, dict[str, Any]] = {
    "muon": {},
    "hf_muon": {},
    "normuon": {"rescale": "rows"},
    "adamuon": {"rescale": "entries"},
}
NAMES = tuple(PRESETS)


def add_names(handler: Callable[..., Any]) -> None:
    """Make each of :data:`NAMES` that is free a valid value of ``optim`` that calls ``handler``.

    Calling it again changes nothing. A name that transformers itself defines keeps its meaning.

    Raises:
        ImportError: This release of transformers has no table of optimizer handlers.
    """
    from transformers import trainer_optimizer
    from transformers.training_args import OptimizerNames

    handlers = getattr(trainer_optimizer, "_OPTIMIZER_HANDLERS", None)
    if not isinstance(handlers, dict):
        raise ImportError(
            f"transformers {version('transformers')} has no table of optimizer handlers, which "
            "hf_muon registers with; releases from 5.2 on have it, tested up to 5.23. Without it, "
            "pass optimizer_cls_and_kwargs=(hf_muon.MuonOptimizerFactory, {'lr': …}) to Trainer."
        )
    for name in NAMES:
        member = OptimizerNames._value2member_map_.get(name)
        if member is None:
            member = _add_member(OptimizerNames, name)
        elif not getattr(member, "_from_hf_muon", False):
            others = [f"{key}={value}" for key, value in PRESETS.get(name, {}).items()]
            logger.warning(
                "transformers has an optimizer %r of its own; ours is optim='hf_muon'%s.",
                name,
                f" with optim_args={others[0]!r}" if others else "",
            )
            continue
        handlers[member] = handler
    logger.info("optim=%s select hf_muon where transformers has none of its own.", ", ".join(NAMES))


def is_ours(optim: str) -> bool:
    """Whether a value of ``TrainingArguments.optim``, member or plain string, selects hf_muon."""
    from transformers.training_args import OptimizerNames

    member = OptimizerNames._value2member_map_.get(optim)
    return getattr(member, "_from_hf_muon", False)


def _add_member(enum: Any, value: str) -> Enum:
    """Add a member to a ``(str, Enum)`` class, including its lookup tables."""
    name = value.upper()
    member = str.__new__(enum, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    member._from_hf_muon = True
    # In a process without hf_muon, a pickled TrainingArguments holds the plain string.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    if hasattr(enum, "_hashable_values_"):  # Python ≥ 3.12
        enum._hashable_values_.append(value)
    type.__setattr__(enum, name, member)
    return cast(Enum, member)
