"""Matrices that overflow in half precision: detected in one step, in float32 from the next.

In: the flags of a step's maps. Out: the same maps, in float32 for matrices flagged earlier. The
flags travel to the host while the next step is prepared, so that nothing waits for them. In the
step in which a polar factor is flagged, it counts as zero.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from hf_muon.distributed.buckets import Unit
from hf_muon.polar import Watch, devices

logger = logging.getLogger(__name__)

Polar = Callable[..., Tensor]


class _Sent(NamedTuple):
    units: list[Unit]
    flags: Tensor
    arrived: torch.Event | None


class Outliers:
    """The flagged matrices of a plan.

    Attributes:
        known: Those flagged in earlier steps.
        found: The flags of this step, on the device, with the matrices that they belong to.
    """

    def __init__(self) -> None:
        self.known: set[Unit] = set()
        self.found: list[tuple[list[Unit], Tensor]] = []
        self._sent: list[_Sent] = []

    def watched(
        self,
        replace: Callable[[Tensor, Polar], None],
        polar: Polar,
        units: Iterable[Unit],
        back: torch.dtype | None,
    ) -> Callable[[Tensor], None]:
        """Return a function that replaces matrices and records the flags.

        Args:
            replace: replaces matrices, (m, n) or (k, m, n), in place, using a polar function.
            polar: that polar function.
            units: the matrices that the function will be called for, in that order.
            back: the dtype in which results are sent. All results must be rounded to it, even
                where they are not sent.
        """
        coming = iter(units)

        def run(X: Tensor) -> None:
            matrices = X if X.ndim == 3 else X[None]
            own = list(islice(coming, len(matrices)))
            again = [(x, x.clone()) for unit, x in zip(own, matrices, strict=True) if unit in known]
            flags: list[Tensor] = []
            replace(X, partial(polar, outliers=Watch(flags, min(own[0].shape))))
            if not devices.is_fake(X):  # a user's map may also ask for other polar factors
                self.found += [(own, of_all) for of_all in flags if len(of_all) == len(own)]
            for x, copy in again:
                # torch's products need no check, which might fail here on one rank alone.
                replace(copy, partial(polar, dtype="float32", kernel="torch"))
                x.copy_(copy.to(back or x.dtype))

        known = self.known
        return run

    def send(self) -> None:
        """Start sending the flags of a step to the host, without waiting."""
        for device in dict.fromkeys(flags.device for _, flags in self.found):
            there = [(own, flags) for own, flags in self.found if flags.device == device]
            units = [unit for own, _ in there for unit in own]
            self._sent.append(_sent(units, torch.cat([flags for _, flags in there])))
        self.found.clear()

    def read(self, name_of: Callable[[Unit], str]) -> None:
        """Read the flags that have arrived, and report the matrices that they belong to."""
        self.found.clear()  # left over from a step that was undone
        while self._sent and (self._sent[0].arrived is None or self._sent[0].arrived.query()):
            units, flags, _ = self._sent.pop(0)
            raised = [unit for unit, is_set in zip(units, flags.tolist(), strict=True) if is_set]
            for unit in raised:
                if unit not in self.known:
                    logger.warning(
                        "The polar factor of %s is not finite or too large in half precision: it "
                        "counted as zero in that step, and is computed in float32 from now on.",
                        name_of(unit),
                    )
                self.known.add(unit)


def _sent(units: list[Unit], flags: Tensor) -> _Sent:
    if flags.device.type != "cuda":
        return _Sent(units, flags, None)
    arrived = torch.Event(flags.device)
    stream = torch.cuda.current_stream(flags.device)
    flags = flags.to("cpu", non_blocking=True)
    arrived.record(stream)
    return _Sent(units, flags, arrived)
