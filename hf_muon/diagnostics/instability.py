"""Warnings of a run that is going wrong, each with its reason.

In: losses as they are logged, and samples. Out: sentences, once for each thing that begins to go
wrong. Polar factors have singular values near one, so neither updates nor weights of Muon can
explode as those of other optimizers do: their sizes give no early sign. These do:

* the loss loses half of what it had gained;
* the iteration that computes polar factors leaves its range;
* a direction that was visible sinks below the noise edge and stays there: the update is noise;
* a weight is no longer finite.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from functools import partial
from statistics import fmean, median

# All published coefficients keep singular values below 1.3, also in bfloat16.
_LARGEST_FACTOR = 1.5
# The noise edge gives one false alarm in a hundred; three in a row are none.
_IN_A_ROW = 3
# Losses whose mean counts: single batches scatter.
_MEAN_OF = 3
# How many typical differences between neighbours a rise must exceed, and how many tell the typical.
_TIMES_SCATTER, _SCATTER_OF = 5, 100


class Instability:
    """Looks at a run while it goes on."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_MEAN_OF)
        self._differences: deque[float] = deque(maxlen=_SCATTER_OF)
        self._first = self._lowest = math.nan
        self._visible: dict[str, deque[bool]] = defaultdict(partial(deque, maxlen=_IN_A_ROW))
        self._once_visible: set[str] = set()
        self._said: set[tuple[str, str]] = set()

    def of_loss(self, loss: float) -> list[str]:
        """Look at one more loss of the training."""
        if not math.isfinite(loss):
            return self._once("loss", "", f"the loss is {loss}")
        if self._latest:
            self._differences.append(abs(loss - self._latest[-1]))
        self._latest.append(loss)
        if len(self._latest) < _MEAN_OF:
            return []
        mean = fmean(self._latest)
        if math.isnan(self._first):
            self._first = self._lowest = mean
        self._lowest = min(self._lowest, mean)
        rise, gained = mean - self._lowest, self._first - self._lowest
        if rise <= max(gained / 2, _TIMES_SCATTER * median(self._differences)):
            self._said.discard(("loss", ""))
            return []
        return self._once(
            "loss",
            "",
            f"the loss rose from {self._lowest:.4g} to {mean:.4g} and has lost "
            f"{'all' if rise > gained else 'more than half'} of what it had gained; lower the "
            "learning rate or warm it up for longer",
        )

    def of_sample(self, layer: str, values: dict[str, float]) -> list[str]:
        """Look at one more sample of a matrix."""
        found = []
        if not math.isfinite(values["weight_rms"]):
            found += self._once("weight", layer, "the weight is no longer finite")
        if values.get("factor_largest", 0.0) > _LARGEST_FACTOR:
            found += self._once(
                "factor",
                layer,
                f"the polar factor has a singular value of {values['factor_largest']:.3g} where 1 "
                "is right: the iteration diverges; use polar_dtype=float32 or polar_method=svd",
            )
        if "visible_rank" in values:
            self._visible[layer].append(values["visible_rank"] > 0)
            if any(self._visible[layer]):
                self._once_visible.add(layer)
                self._said.discard(("visible", layer))
            elif layer in self._once_visible:
                found += self._once(
                    "visible",
                    layer,
                    f"for {_IN_A_ROW} samples no direction of the averaged gradient stands above "
                    "the noise, though one did before; a larger momentum, a larger batch or a "
                    "lower learning rate would show it",
                )
        return found

    def _once(self, reason: str, layer: str, text: str) -> list[str]:
        """The text, unless it was said and holds on."""
        if (reason, layer) in self._said:
            return []
        self._said.add((reason, layer))
        return [text]
