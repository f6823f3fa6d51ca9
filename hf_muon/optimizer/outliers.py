"""Matrices that half precision is not enough for: noticed in one step, in float32 from the next.

In: what the maps of a step flagged. Out: the same maps, in float32 for what was flagged before. The
flags are on their way to the host while the next step is prepared, so that nothing waits for them;
in the step that flags it, its polar factor counts as zero.
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
    """The matrices of a plan that were flagged.

    Attributes:
        known: In earlier steps.
        found: The flags of this step, on the device, with the matrices that they are of.
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
        """A function that replaces matrices, and takes note of what is flagged in them.

        Args:
            replace: replaces matrices, (m, n) or (k, m, n), by what it makes of them with a polar
                factor.
            polar: that polar factor.
            units: what the function will be called for, in that order.
            back: the dtype that results travel in, which all of them have to fit, also on the rank
                that need not send them.
        """
        coming = iter(units)

        def run(X: Tensor) -> None:
            matrices = X if X.ndim == 3 else X[None]
            own = list(islice(coming, len(matrices)))
            again = [(x, x.clone()) for unit, x in zip(own, matrices, strict=True) if unit in known]
            flags: list[Tensor] = []
            replace(X, partial(polar, outliers=Watch(flags, min(own[0].shape))))
            if not devices.is_fake(X):  # a map of one's own may ask for other polar factors, too
                self.found += [(own, of_all) for of_all in flags if len(of_all) == len(own)]
            for x, copy in again:
                # By products that need no check, which might fail here, on one rank alone.
                replace(copy, partial(polar, dtype="float32", kernel="torch"))
                x.copy_(copy.to(back or x.dtype))

        known = self.known
        return run

    def send(self) -> None:
        """Send the flags of a step to the host, without waiting."""
        for device in dict.fromkeys(flags.device for _, flags in self.found):
            there = [(own, flags) for own, flags in self.found if flags.device == device]
            units = [unit for own, _ in there for unit in own]
            self._sent.append(_sent(units, torch.cat([flags for _, flags in there])))
        self.found.clear()

    def read(self, name_of: Callable[[Unit], str]) -> None:
        """Read the flags that have arrived, and say once of which matrices they are."""
        self.found.clear()  # of a step that was taken back
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
