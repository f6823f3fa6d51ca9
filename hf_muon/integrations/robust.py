"""A median, a trimmed mean or Multi-Krum over ranks, instead of the mean: for a Trainer under DDP.

In: the events of a Trainer. Out: a communication hook on the Trainer's DDP model, or an error that
says why the gradients of single ranks are not available; warnings that name ranks with gradients
that are not finite.
"""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_muon.distributed.robust import Robust, make_robust

logger = logging.getLogger(__name__)


class RobustAggregation(TrainerCallback):
    """Aggregates the gradients of DDP's ranks so that a few bad ones do not spoil them.

    Pass it to any Trainer, with any optimizer:
    ``Trainer(..., callbacks=[RobustAggregation("median")])``. Each rank first sums the gradients of
    its micro-batches; the hook runs once per step. It keeps no state between steps.

    Args:
        method: ``median`` or ``trimmed_mean``, entry by entry, or ``multi_krum``, which leaves out
            whole ranks.
        trim: How many to leave out: for a trimmed mean, of the lowest and of the highest values;
            for Multi-Krum, of the ranks. The median does not use it.

    Raises:
        ValueError: An unknown method or number; or, when training begins, there is only one
            process, FSDP or DeepSpeed is used, or ``trim`` leaves too few ranks.

    Example:
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[RobustAggregation()])
    """

    def __init__(self, method: str = "median", trim: int = 1) -> None:
        self.settings = Robust(method, trim)
        self._waiting: RemovableHandle | None = None
        self._state: Robust | None = None
        self._said: set[int] = set()

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        """Raise for what cannot work, and wait for the first call of the wrapped model.

        A Trainer does not show its wrapped model to callbacks. The model's first call comes before
        the first backward pass, which is early enough.
        """
        self._stop_waiting()
        self._state, self._said = None, set()
        model = kwargs["model"]
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        _require_ddp(model)
        if self.settings.left_out(ranks) == 0:
            logger.warning("The median of two ranks is their mean: neither is left out.")

        def register(called: nn.Module, _: Any) -> None:
            if (wrapped := _wrapper(called, model)) is not None:
                self._stop_waiting()
                settings = Robust(self.settings.method, self.settings.trim)
                self._state = make_robust(wrapped, settings)

        self._waiting = register_module_forward_pre_hook(register)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Raise before a step whose gradients were averaged after all."""
        if self._state is None:
            self._stop_waiting()
            raise RuntimeError(
                "No DistributedDataParallel around the model was called: gradients were not "
                "aggregated robustly. RobustAggregation is for Trainers that wrap the model in DDP."
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn once about each rank whose gradients were not finite; every rank sees a part."""
        if self._state is None or self._state.not_finite is None:
            return
        bad = self._state.not_finite.nonzero().flatten().tolist()
        leaves_out = self.settings.method == "multi_krum"
        effect = (
            "it is the first to be left out" if leaves_out else "these entries count as extremes"
        )
        for rank in sorted({*bad} - self._said):
            logger.warning(
                "Up to step %d rank %d has sent gradients with NaN or infinity; %s.",
                state.global_step,
                rank,
                effect,
            )
        self._said.update(bad)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop waiting if the model was never called."""
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None


def _wrapper(called: nn.Module, model: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP around a model, if that is what was called; looks into compiled modules."""
    called = getattr(called, "_orig_mod", called)
    if isinstance(called, DistributedDataParallel):
        inside: object = getattr(model, "_orig_mod", model)
        if inside in (called.module, getattr(called.module, "_orig_mod", None)):
            return called
    return None


def _require_ddp(model: nn.Module) -> None:
    """Raise where gradients are reduced before ranks can compare them."""
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

    kind = AcceleratorState().distributed_type.value
    if kind in ("FSDP", "DEEPSPEED") or any(hasattr(p, "placements") for p in model.parameters()):
        name = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}.get(kind, "a sharded model")
        raise ValueError(
            f"RobustAggregation needs DDP, and this is {name}: there the sum over ranks is made "
            "while gradients are sharded, and no rank sees what the others had."
        )
