"""Warnings of a run that is going wrong, each with its reason.

In: losses as they are logged, and samples. Out: sentences, once for each problem that begins. Polar
factors have singular values near one, so updates and weights of Muon cannot explode as those of
other optimizers do, and their sizes give no early sign. These do:

* the loss loses half of what it had gained;
* the iteration that computes polar factors leaves its range;
* no watched matrix has a direction above the noise any more: the updates are noise;
* a weight is no longer finite.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from statistics import fmean, median

# All published coefficients keep singular values below 1.3, also in bfloat16.
_LARGEST_FACTOR = 1.5
# The noise edge gives one false alarm in a hundred; three in a row are not one.
_IN_A_ROW = 3
# The number of losses to average, because single batches vary.
_MEAN_OF = 3
# How many typical differences between neighbors a rise must exceed; over how many losses the
# typical difference is taken.
_TIMES_SCATTER, _SCATTER_OF = 5, 100
# A loss this many times the first one is a problem, unless the first was near zero, as losses in
# reinforcement learning are.
_TIMES_START, _SMALL = 1.5, 0.1


class Instability:
    """Observes a run."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_MEAN_OF)
        self._differences: deque[float] = deque(maxlen=_SCATTER_OF)
        self._first = self._lowest = math.nan
        self._visible: deque[bool] = deque(maxlen=_IN_A_ROW)
        self._was_visible = False
        self._said: set[tuple[str, str]] = set()

    def of_loss(self, loss: float) -> list[str]:
        """Return warnings after one more training loss."""
        if not math.isfinite(loss):
            return self._once("loss", "", f"the loss is {loss}")
        if self._latest:
            self._differences.append(abs(loss - self._latest[-1]))
        else:
            self._first = self._lowest = loss
        self._latest.append(loss)
        if len(self._latest) < _MEAN_OF:
            return []
        mean = fmean(self._latest)
        self._lowest = min(self._lowest, mean)
        rise, gained = mean - self._lowest, self._first - self._lowest
        has_risen = rise > max(gained / 2, _TIMES_SCATTER * median(self._differences))
        # A loss that rises from the start has no quiet past to compare it with.
        if not has_risen and not mean > _TIMES_START * self._first > _TIMES_START * _SMALL:
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
        """Return warnings after one more sample of a matrix."""
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
        return found

    def of_all(self, samples: Collection[dict[str, float]]) -> list[str]:
        """Return warnings after the samples of all matrices in one step."""
        ranks = [values["visible_rank"] for values in samples if "visible_rank" in values]
        if not ranks:
            return []
        self._visible.append(any(ranks))
        if len(self._visible) < _IN_A_ROW or any(self._visible):
            self._was_visible |= all(self._visible)
            self._said.discard(("visible", ""))
            return []
        if not self._was_visible:
            return []
        return self._once(
            "visible",
            "",
            f"for {_IN_A_ROW} samples no watched matrix shows a direction above the noise, though "
            "some did before: a larger momentum or batch, or a lower learning rate, would show it",
        )

    def _once(self, reason: str, layer: str, text: str) -> list[str]:
        """Return the text, unless it was returned before and the problem persists."""
        if (reason, layer) in self._said:
            return []
        self._said.add((reason, layer))
        return [text]
