"""A check when ranks compare: those that hold copies of a tensor have the same gradient for it.

In: the entries of all param groups, with gradients. Out: nothing, or an error on all ranks before
anything is written. Without averaged gradients the copies drift apart; and if the ranks divide the
work on matrices, a rank applies updates computed from another rank's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_muon.distributed.find import agreed, is_dtensor, sent_to
from hf_muon.distributed.layout import Ranks
from hf_muon.optimizer.entries import Entry


def of_unequal_copies(
    entries: Sequence[Entry], replicate: Ranks, device: torch.device
) -> ValueError | None:
    """Return an error, on all ranks with copies, if the gradients of these were not averaged.

    Averaged gradients agree bit by bit, so their norms differ at most in the last few bits. The
    norm over all parameters would not do, because clipping makes it equal. Shards are skipped, and
    so are parameters for which some rank has no gradient.

    Args:
        entries: All entries of a step.
        replicate: The ranks that hold copies of the plain tensors among them.
        device: Where messages are sent from.

    Returns:
        The error, which names the first parameter whose gradients differ; or None.
    """
    entries = [e for e in entries if e.flat is None and not is_dtensor(e.tensor)]
    if replicate.size == 1 or not entries:
        return None
    norms = torch.zeros(len(entries), dtype=torch.float32, device="cpu")
    given = {n: e.tensor.grad for n, e in enumerate(entries) if e.tensor.grad is not None}
    if given:
        found = torch._foreach_norm(list(given.values()))
        norms[list(given)] = torch.stack([one.float().to(device) for one in found]).cpu()
    bits = norms.view(torch.int32)  # grow with the norm, by 2²³ when it doubles
    told = agreed(sent_to(device, torch.cat([bits, -bits]).tolist()), [replicate]).cpu()
    most, least = told.chunk(2)
    other = ((most + least > 2**7) & (least < 0)).nonzero().flatten().tolist()
    if not other:
        return None
    entry, norm = entries[other[0]], norms[other[0]]
    return ValueError(
        f"The ranks have copies of the model but different gradients, of norm {norm:.6g} here in "
        f"{entry.name}: nobody has averaged them, and each rank would train on its own. Call the "
        "model that DistributedDataParallel has wrapped, not the one inside, and leave no_sync() "
        "for the last part of a batch. Average the gradients of what FSDP2 leaves out "
        "(ignored_params), and of whole tensors beside tensor-parallel ones, before the step. With "
        "the Trainer do not evaluate or predict before train(): transformers (5.23) then trains "
        "without DDP. No parameter and no state was changed."
    )
