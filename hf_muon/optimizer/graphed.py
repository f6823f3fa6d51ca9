"""The work of the Muon groups as a CUDA graph: captured once, then replayed in one launch.

In: plans, and the entries that a step trains of each. Out: weights and buffers, changed in place;
or False, if the step must be done without a graph. Gradients are copied to where the graph reads
them, and the learning rate is a number on the device. Everything else that the work depends on is a
key; a new key means a new capture. Whether gradients are usable is known before the work begins.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from hf_muon.distributed.exchange import run_overlapped
from hf_muon.distributed.find import local_gradient
from hf_muon.optimizer.capturable import KINDS, Chosen, Work, is_due, why_not
from hf_muon.optimizer.groups import STRUCTURE
from hf_muon.optimizer.step import bucket_step
from hf_muon.polar import Workspace

Key = list[tuple[list[Any], dict[str, Any], list[torch.dtype], Any, frozenset[Any]]]
"""What captured work depends on, of each plan."""
WARM_UP = 3
"""Steps on a side stream before the capture: libraries set themselves up in the first ones."""
IN_VAIN = 8
"""Changes of the key, each before a graph was replayed, after which steps stay plain."""


class Graphed:
    """The captured work of an optimizer, if there is any."""

    def __init__(self) -> None:
        self._captured: _Captured | None = None
        self._in_vain = 0
        self._given_up: str | None = None
        self._said: set[str] = set()

    def step(self, chosen: Chosen, workspace: Workspace, *, is_alone: bool) -> bool:
        """Do the work of a step on matrices; return False, and do nothing, if a graph cannot.

        ``is_alone`` says that no other rank trains the same weights. A rank that cannot capture and
        steps without a graph would round them differently.
        """
        reason = self._given_up or (why_not(chosen) if chosen else None)
        if reason is None and not is_alone:
            reason = "several ranks train together"
        if reason is not None:
            self._say(reason)
        if reason is not None or not chosen or is_due(chosen):
            return False
        for plan, _ in chosen:
            plan.read_outliers()
        key = _key(chosen)
        if self._captured is None or self._captured.key != key:
            self._note_change(key)
            self._captured = None  # frees its memory before gradients get new places
            if self._given_up is not None:
                return False
            self._captured = _Captured(key, chosen, workspace)
        try:
            self._captured.run(chosen)
        except CaptureError as error:
            self._given_up, self._captured = f"the device cannot capture the work ({error})", None
        return self._captured is not None

    def _note_change(self, key: Key) -> None:
        if self._captured is None:
            return
        self._in_vain = 0 if self._captured.replay else self._in_vain + 1
        if self._in_vain == IN_VAIN:
            what = _differences(self._captured.key, key)
            self._given_up = f"{what} changed {IN_VAIN} times, each before a replay"

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"cuda_graph=True, and steps are done without a graph: {reason}. They are right, "
                "and take the time that they take without the setting.",
                stacklevel=7,
            )


class CaptureError(RuntimeError):
    """The device refused to capture; nothing was done."""


class _Captured:
    """A graph, and the tensors that it reads and writes."""

    def __init__(self, key: Key, chosen: Chosen, workspace: Workspace) -> None:
        self.key, self._runs = key, 0
        self.replay: Work | None = None
        self._device = chosen[0][0].buckets[0].device
        self._gradients: list[Tensor] = []
        self._rates: list[Tensor] = []
        self._flags: list[Any] = []
        self._work: list[tuple[Any, list[Any]]] = []
        for plan, entries in chosen:
            step = plan.step(entries, workspace)
            places = {e: torch.empty_like(local_gradient(e.tensor)) for e in entries}
            both = zip(plan.entries, step.gradients, strict=True)
            step.gradients = [places.get(entry, unused) for entry, unused in both]
            # float64, as on the host: it is rounded only where it is used.
            rate = torch.zeros((), dtype=torch.float64, device=self._device)
            # Steps that balance LoRA's A and B run without a graph.
            step.settings = {**plan.group, "lr": rate, "tangent_balance_every": 0}
            self._gradients += places.values()
            self._rates.append(rate)
            self._work.append((step, plan.held(entries)))

    def run(self, chosen: Chosen) -> None:
        """Do one step: the same work with new gradients and a new learning rate."""
        given = [local_gradient(entry.tensor) for _, entries in chosen for entry in entries]
        torch._foreach_copy_(self._gradients, given)
        for rate, (plan, _) in zip(self._rates, chosen, strict=True):
            rate.fill_(plan.group["lr"])
        graphs = KINDS[self._device.type]
        self._runs += 1
        if self._runs <= WARM_UP:
            graphs.aside(self._do, self._device)
            return
        if self.replay is None:
            try:
                self.replay = graphs.capture(self._do, self._device)
            except RuntimeError as error:
                raise CaptureError(str(error).splitlines()[0]) from error
            self._flags = [list(step.outliers.found) for step, _ in self._work]
        self.replay()
        for (step, _), flags in zip(self._work, self._flags, strict=True):
            step.outliers.found[:] = flags  # the replay has written them there

    def _do(self) -> None:
        for step, held in self._work:
            run_overlapped(bucket_step(one, step) for one in held)
            if step.failures:
                raise step.failures.pop()


def _key(chosen: Chosen) -> Key:
    """Return what captured work depends on: tensors, their places, settings except the rate."""
    return [
        (
            plan.held(entries),  # the same objects while nobody moves a tensor
            {k: v for k, v in plan.group.items() if k not in STRUCTURE and k != "lr"},
            [entry.tensor.grad.dtype for entry in entries if entry.tensor.grad is not None],
            (plan.momenta(0) if plan.has_schedule else plan.group.get("momenta")),
            frozenset(plan.outliers.known),
        )
        for plan, entries in chosen
    ]


def _differences(before: Key, now: Key) -> str:
    names = [
        name
        for (_, old, *_), (_, new, *_) in zip(before, now, strict=False)
        for name in new
        if old.get(name) != new[name]
    ]
    return ", ".join(dict.fromkeys(names)) or "the set of tensors that are trained"
