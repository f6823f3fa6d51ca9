"""Which parts of a step a CUDA graph can capture: which devices, which rules, which steps.

In: plans, and the entries that a step trains of each. Out: how to capture on their device, or why
it is impossible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hf_muon.optimizer.entries import Entry
from hf_muon.optimizer.pair_maps import due_for_balance
from hf_muon.optimizer.plans import Plan
from hf_muon.rules import asks_the_host

Chosen = Sequence[tuple[Plan, Sequence[Entry]]]
Work = Callable[[], None]


class Graphs(NamedTuple):
    """How to capture work on a type of device.

    Attributes:
        aside: Runs work before it is captured, as a warmup.
        capture: Records work without running it, and returns a function that replays it.
    """

    aside: Callable[[Work, torch.device], None]
    capture: Callable[[Work, torch.device], Work]


def _aside(work: Work, device: torch.device) -> None:
    with torch.cuda.device(device):
        here = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(here)
        with torch.cuda.stream(side):
            work()
        here.wait_stream(side)


def _capture(work: Work, device: torch.device) -> Work:
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        # Restores the stream: torch.cuda.graph (2.13) leaves its own behind if a capture fails.
        torch.cuda.stream(torch.cuda.current_stream(device)),
        # Data-loading threads may allocate pinned memory meanwhile.
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        work()
    return graph.replay


KINDS = {"cuda": Graphs(_aside, _capture)}
"""The kinds of devices that can."""


def why_not(chosen: Chosen) -> str | None:
    """Say why a step on some plans can never be replayed; None if it can."""
    found = [_reason_of(plan, entries) for plan, entries in chosen]
    where = {bucket.device for plan, _ in chosen for bucket in plan.buckets}
    more = "matrices are on several devices" if len(where) > 1 else None
    return next(filter(None, [*found, more]), None)


def _reason_of(plan: Plan, entries: Sequence[Entry]) -> str | None:
    asking = asks_the_host(plan.group)
    if asking is not None:
        return f"with {asking} the host takes part in every step"
    for held in plan.held(entries):
        if held.device.type not in KINDS or held.device != held.bucket.device:
            return f"matrices are on {held.device}, and a CUDA device is needed"
    if plan.has_schedule and plan.momenta(0) != plan.momenta(1):
        return "momentum changes from this step to the next; they are replayed when it rests"
    return None


def is_due(chosen: Chosen) -> bool:
    """Whether this step balances the norms of LoRA's A and B, which only some steps do."""
    return any(
        due_for_balance(held.bucket, plan.counts, plan.group["tangent_balance_every"])
        for plan, entries in chosen
        if plan.rule.whole.balances
        for held in plan.held(entries)
    )
