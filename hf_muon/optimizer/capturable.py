"""What of a step can be captured: on which devices, by which rules, and in which steps.

In: plans, and what a step trains of each. Out: how their device captures, or why it cannot.
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
    """How a kind of device captures.

    Attributes:
        aside: Runs work that is to be captured later.
        capture: Records work, without running it, and gives what replays it.
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
        # Set again in the end: torch.cuda.graph (2.13) leaves its own stream if a capture fails.
        torch.cuda.stream(torch.cuda.current_stream(device)),
        # Threads that load data may allocate pinned memory meanwhile.
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        work()
    return graph.replay


KINDS = {"cuda": Graphs(_aside, _capture)}
"""The kinds of devices that can."""


def why_not(chosen: Chosen) -> str | None:
    """Why a step on some plans cannot be replayed at all."""
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
    """Whether factors of adapters are balanced in this step, which happens now and then."""
    return any(
        due_for_balance(held.bucket, plan.counts, plan.group["tangent_balance_every"])
        for plan, entries in chosen
        if plan.rule.whole.balances
        for held in plan.held(entries)
    )
