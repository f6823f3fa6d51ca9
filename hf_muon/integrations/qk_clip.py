"""Bound attention logits while a Trainer trains.

In: the events of a Trainer, with any optimizer. Out: query and key weights, scaled down at sampled
steps if logits exceeded a threshold; and ``max_attention_logit`` in the Trainer's logs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_muon.integrations.attention_logits import LogitObserver
from hf_muon.integrations.attentions import Attention, find_attentions
from hf_muon.integrations.log_values import log_with_next, take_waiting
from hf_muon.integrations.report import find_muon
from hf_muon.integrations.row_scaling import is_partitioned, scale_attention
from hf_muon.integrations.transformers import install_callback


class QKClip(TrainerCallback):
    r"""QK-clip, MuonClip's bound on attention logits, for the attention classes it knows.

    Let S_h be the largest logit of head h, q·k/√d before the softmax and inside the attention mask,
    over all tokens of the step and all ranks. If S_h > τ, the weights of queries and keys are
    scaled so that the same q·k is multiplied by γ_h = τ/S_h: both by √γ_h. Heads that share a key
    scale it by √γ_min, with the smallest of their γ, and each query by γ_h/√γ_min. In multi-head
    latent attention, the part without rotation is scaled by √γ_h on both sides, the rotated query
    by γ_h, and the rotated key, which all heads share, not at all.

    The logits are those of the step's own forward passes, computed a second time beside the
    attention kernel; only sampled steps cost anything. Weights are scaled after the optimizer's
    step. Every sample makes the Trainer log ``max_attention_logit``, the largest S_h before
    clipping. Pass the callback to any Trainer, with any optimizer, in one process or under DDP,
    FSDP2 and DeepSpeed ZeRO.

    Args:
        threshold: τ, > 0.
        every: Steps between samples, ≥ 1.

    Raises:
        ValueError: A number is out of range; or, when training begins, an attention module
            normalizes queries or keys, is of an unknown class, or is trained under
            ``step_rule="hyperball"``.
        RuntimeError: After a sampled step: no logits were observed.

    References:
        arXiv 2507.20534, Algorithm 1.

    Example:
        >>> clip = QKClip(threshold=100.0, every=10)
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[clip]).train()
    """

    def __init__(self, threshold: float = 100.0, every: int = 10) -> None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < math.inf:
            raise ValueError(f"threshold={threshold!r}: a finite number > 0 is expected.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: a whole number ≥ 1 is expected.")
        install_callback()  # it adds values to the logs; existing Trainers may lack it
        self.threshold = float(threshold)
        self.every = every
        self._attentions: list[Attention] = []
        self._observer: LogitObserver | None = None
        self._sampled = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the attention modules, or raise."""
        self._close()
        _refuse_divided_tokens(args)
        self._attentions = find_attentions(kwargs["model"])
        _check_trained_here(self._attentions, kwargs.get("optimizer"))
        self._observer = LogitObserver(self._attentions)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the logits if the step is sampled."""
        self._sampled = (state.global_step + 1) % self.every == 0
        if self._observer is not None and self._sampled:
            self._observer.open()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scale heads above the threshold; the step is done, the next forward has not begun."""
        if self._observer is None or not self._sampled:
            return
        self._observer.close()
        largest = self._clip(args.device)
        if largest == -math.inf:
            raise RuntimeError(
                f"QKClip saw no attention logits in step {state.global_step + 1}: the model's "
                "attention does not go through the table of attention functions of transformers. "
                "torch.compile, DataParallel and attention functions of one's own hide it: do "
                "without them, or remove QKClip from the callbacks."
            )
        control.should_log = True
        log_with_next(kwargs.get("optimizer"), {"max_attention_logit": largest})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the value if the Trainer was built before the callback that adds values."""
        if logs is not None and (missed := take_waiting(kwargs.get("optimizer"))):
            logs.update(missed)
            state.log_history[-1].update(missed)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Restore the attention functions."""
        self._close()

    def _clip(self, device: torch.device) -> float:
        """Scale the heads above the threshold; return the largest logit before that."""
        assert self._observer is not None
        dtype = self._attentions[0].dtype
        found = self._observer.take(device, torch.promote_types(dtype, torch.float32))
        for attention, largest in zip(self._attentions, found, strict=True):
            above = (largest > self.threshold) & largest.isfinite()
            if above.any():
                gamma = torch.where(above, self.threshold / largest, torch.ones_like(largest))
                scale_attention(attention, gamma)
        return float(torch.cat(found).max())

    def _close(self) -> None:
        if self._observer is not None:
            self._observer.close()
        self._observer, self._attentions, self._sampled = None, [], False


def _refuse_divided_tokens(args: TrainingArguments) -> None:
    """Raise if tokens are divided among ranks: queries see keys that this rank does not have."""
    parallelism = getattr(args, "parallelism_config", None)
    for name in ("cp_size", "sp_size", "tp_size"):
        if (getattr(parallelism, name, None) or 1) > 1:
            raise ValueError(
                f"QKClip does not work under {name}={getattr(parallelism, name)}, which divides "
                "tokens or heads among ranks. Use DDP, FSDP version 2 or ZeRO."
            )


def _check_trained_here(attentions: list[Attention], optimizer: Any) -> None:
    """Raise if the optimizer trains copies that cannot be found, or restores a weight's norm."""
    if optimizer is None:
        return
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    muon = find_muon(optimizer)
    named = {
        name: group.get("step_rule")
        for group in (muon.param_groups if muon is not None else [])
        for name in group.get("param_names", [])
    }
    for attention in attentions:
        for name, projection in attention.projections.items():
            weight = projection.weight
            group = held.get(id(weight), {})  # DeepSpeed's have other tensors, and the names
            rule = group.get("step_rule", named.get(f"{attention.name}.{name}.weight"))
            if rule == "hyperball":
                raise ValueError(
                    f"QKClip scales {attention.name}.{name}.weight down, and step_rule='hyperball' "
                    "restores its norm in the next step. Use another step_rule, or leave QKClip "
                    "out."
                )
            if id(weight) not in held and not is_partitioned(weight):
                raise ValueError(
                    f"The optimizer does not hold {attention.name}.{name}.weight itself, so that "
                    "QKClip would scale a copy that the next step overwrites. Use an optimizer "
                    "that trains the model's own parameters, or DeepSpeed ZeRO 1, 2 or 3."
                )
