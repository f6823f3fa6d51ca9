"""Whether ranks that hold copies of tensors have the same gradients for them: at the first step.

In: the entries of all param groups, with gradients. Out: nothing, or an error on all ranks, before
anything is written: without an average over the ranks the copies would drift apart, and where the
work on matrices is divided, each would get the updates of others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_muon.distributed.find import agreed, is_dtensor, sent_to
from hf_muon.distributed.layout import Ranks
from hf_muon.optimizer.entries import Entry


def check_copies(entries: Sequence[Entry], members: Sequence[Ranks], device: torch.device) -> None:
    """Raise on all ranks where whole tensors have gradients that nobody has averaged.

    Averages are the same to the bit, so that of norms only some last bits may differ. The norm of
    all would not do: clipping makes it the same. Nothing is said of what some rank has no gradient
    for, nor of shards.

    Args:
        entries: What is trained, the same on all ranks.
        members: The groups of ranks that hold copies.
        device: Where messages are.

    Raises:
        ValueError: Names the first parameter whose gradients differ.
    """
    if any(entry.flat is not None or is_dtensor(entry.tensor) for entry in entries):
        return
    norms = torch.zeros(len(entries), dtype=torch.float32, device="cpu")
    given = {n: e.tensor.grad for n, e in enumerate(entries) if e.tensor.grad is not None}
    if given:
        found = torch._foreach_norm(list(given.values()))
        norms[list(given)] = torch.stack([one.float().to(device) for one in found]).cpu()
    bits = norms.view(torch.int32)  # which grow as norms do, 2²³ of them for a factor of 2
    told = agreed(sent_to(device, torch.cat([bits, -bits]).tolist()), members).cpu()
    most, least = told.chunk(2)
    other = ((most + least > 2**7) & (least < 0)).nonzero().flatten().tolist()
    if other:
        entry, norm = entries[other[0]], norms[other[0]]
        raise ValueError(
            "The ranks have copies of the model and other gradients, of norm "
            f"{norm:.6g} here in {entry.name}: nobody has averaged them, and each rank would train "
            "on its own. Call the model that DistributedDataParallel has wrapped, not the one "
            "inside, and leave no_sync() for the last part of a batch. With the Trainer do not "
            "evaluate or predict before train(): transformers (5.23) then trains without DDP. No "
            "parameter and no state was changed."
        )
