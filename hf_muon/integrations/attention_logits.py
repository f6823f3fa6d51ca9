"""The largest attention logit of each head, observed while a model computes.

In: attention modules of transformers, and the forward passes between ``open()`` and ``close()``.
Out: for each head, the largest q·k·scale over all pairs that the attention mask admits. Queries and
keys are those that the model passes to its attention kernel, after rotation. The kernel does not
expose its logits; it runs unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_muon.integrations.attentions import Attention
from hf_muon.polar import in_own_dtype

_LIMIT = 2**24  # logits that are held at a time, in a block of queries: 64 MiB


class LogitObserver:
    """Observes the logits of some attention modules."""

    def __init__(self, attentions: Sequence[Attention]) -> None:
        self._known = {id(one.module): one for one in attentions}
        self._largest: dict[int, Tensor] = {}
        self._original: Callable[..., Any] | None = None

    def open(self) -> None:
        """Start observing.

        All models look up their attention function in one table, at each call. A replacement in
        that table does not reach modules that a compiler has already traced.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as TABLE

        self.close()
        self._largest = {}
        self._original = original = TABLE.get_interface

        def get_interface(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
            attend = original(implementation, default)

            def attention(
                module: Any,
                query: Tensor,
                key: Tensor,
                value: Tensor,
                attention_mask: Any = None,
                **more: Any,
            ) -> Any:
                self._see(module, query, key, attention_mask, str(implementation), more)
                return attend(module, query, key, value, attention_mask, **more)

            return attention

        vars(TABLE)["get_interface"] = get_interface

    def close(self) -> None:
        """Stop observing."""
        if self._original is not None:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as TABLE

            vars(TABLE).pop("get_interface", None)
            self._original = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _see(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, kind: str, more: dict[str, Any]
    ) -> None:
        one = self._known.get(id(module))
        if one is None:
            return
        if query.shape[1] != one.heads:
            raise ValueError(
                f"QKClip saw {query.shape[1]} heads in {one.name}, which has {one.heads}: they are "
                "divided among ranks. Use DDP, FSDP version 2 or ZeRO, without tensor parallelism."
            )
        with torch.no_grad():
            found = largest_logits(module, query, key, mask, kind, more)
        before = self._largest.get(id(module))
        self._largest[id(module)] = found if before is None else torch.maximum(before, found)

    def take(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Return the largest logit of each head over all ranks, (heads,) per module, on the CPU.

        It is -∞ if nothing was observed, and ∞ if a query or a key is not finite.

        Args:
            device: The device on which ranks communicate.
            dtype: Of the result.
        """
        heads = {key: one.heads for key, one in self._known.items()}
        each = [self._largest.get(key, torch.full((n,), -torch.inf)) for key, n in heads.items()]
        every = torch.cat([one.to(device, dtype) for one in each])
        self._largest = {}
        # Infinity stands for NaN, because NaN has no maximum.
        every = every.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(every, op=dist.ReduceOp.MAX)
        # On the CPU, so that all ranks decide the same.
        return list(torch.split(every.cpu(), list(heads.values())))


def largest_logits(
    module: Any, query: Tensor, key: Tensor, mask: Any, kind: str, more: dict[str, Any]
) -> Tensor:
    """Return the largest visible logit of each head.

    Args:
        module: The attention module.
        query: Queries, (batch, heads, tokens, size).
        key: Keys, (batch, key heads, keys, size).
        mask: As the attention function receives it.
        kind: Name of the attention function.
        more: Its keyword arguments.

    Returns:
        (heads,), -∞ for a head that sees nothing.
    """
    batch, heads, tokens, size = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scaling = more.get("scaling")
    query = query.to(wide) * (size**-0.5 if scaling is None else scaling)
    key = key.to(wide).repeat_interleave(heads // key.shape[1], dim=1).transpose(2, 3)
    visible = visibility(module, tokens, key, mask, kind, more)
    step = max(1, _LIMIT // (batch * heads * key.shape[3]))
    largest = query.new_full((heads,), -torch.inf)
    for start in range(0, tokens, step):
        rows = torch.arange(start, min(start + step, tokens), device=query.device)
        with in_own_dtype(query.device.type):
            logits = query[:, :, start : start + step] @ key  # (batch, heads, rows, keys)
        logits.masked_fill_(~visible(rows), -torch.inf)
        largest = torch.maximum(largest, logits.amax(dim=(0, 2, 3)))
    return largest


def visibility(
    module: Any, tokens: int, key: Tensor, mask: Any, kind: str, more: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """Return a function of query indices: which keys they see, as booleans."""
    keys = key.shape[3]
    if hasattr(mask, "mask_mod"):  # a BlockMask of flex attention
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, len(key), None, tokens, keys, device=str(key.device))
    if mask is not None and mask.ndim == 4:
        if mask.dtype != torch.bool:  # it is added to the logits: hugely negative hides a key
            mask = mask > torch.finfo(mask.dtype).min / 2
        return lambda rows: mask[:, :, rows, :keys].to(key.device)
    return _without_mask(module, tokens, key, mask, kind, more)


def _without_mask(
    module: Any, tokens: int, key: Tensor, padding: Any, kind: str, more: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The same for kernels that get rules and, at most, a padding mask."""
    keys, flash = key.shape[3], "flash" in kind
    causal = more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and tokens > 1 and kind != "eager"  # eager uses only masks
    window = more.get("sliding_window") if flash else None
    segments = _segments(tokens, key, more) if flash and padding is None else None
    columns = torch.arange(keys, device=key.device)

    def seen(rows: Tensor) -> Tensor:
        # With more keys than queries, flash attention aligns their ends, SDPA their beginnings.
        distance = (rows + (keys - tokens if flash else 0))[:, None] - columns
        found = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            found &= distance >= 0
        if window is not None:
            found &= distance.abs() < window
        if segments is not None:
            found &= segments[rows][:, None] == segments
        # The padding mask is (batch, keys).
        return found if padding is None else found & padding[:, None, None, :keys].bool()

    return seen


def _segments(tokens: int, key: Tensor, more: dict[str, Any]) -> Tensor | None:
    """Return the sequence of each token, if flash attention gets several sequences in one row."""
    ends, positions = more.get("cu_seq_lens_q"), more.get("position_ids")
    if ends is not None:
        places = torch.arange(tokens, device=key.device)
        marks: Tensor = torch.bucketize(places, ends[1:].to(places), right=True)
        return marks
    if positions is not None and positions.shape == (1, tokens) and key.shape[3] == tokens:
        marks = (positions[0] == positions[0, 0]).cumsum(0).to(key.device)
        return marks
    return None
