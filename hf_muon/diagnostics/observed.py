"""Which layers of the next run should go to Muon, judging by what a monitor recorded.

In: the records of ``spectra.jsonl``. Out: numbers per layer, and patterns for ``adamw_params``.
Nothing here changes the current run; use the result in the next one. Pure functions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hf_muon.diagnostics.advice import typical
from hf_muon.diagnostics.gradients import parameter_of

# The most layer numbers in one pattern; with more, it would exceed the limit for a setting.
_MOST_NUMBERS = 100


@dataclass(frozen=True)
class Observed:
    """One matrix over the later half of its samples, as medians; None if nothing was recorded.

    Attributes:
        layer: Its name.
        samples: The number of samples that count.
        nuclear_rank: ‖G‖_*²/‖G‖_F² of the gradient.
        input_rank: ‖A‖_F²/‖A‖₂² of the layer's input activations, one row per token.
        ratio: ``nuclear_rank`` over ``input_rank``, sample by sample.
        stable_rank: ‖G‖_F²/‖G‖₂².
        visible_rank: Number of singular values of the average above the noise edge.
        noise_to_signal: tr Σ/‖S‖_F², as the ratio of sums over the samples.
        smallest_window: T_min = (1 + s²√(mn)/λ²)/2 of the weakest visible direction, if there is
            one.
    """

    layer: str
    samples: int
    nuclear_rank: float | None
    input_rank: float | None
    ratio: float | None
    stable_rank: float | None
    visible_rank: float | None
    noise_to_signal: float | None
    smallest_window: float | None

    @property
    def parameter(self) -> str:
        """The parameter that contains the matrix; patterns match its name."""
        return parameter_of(self.layer)

    @property
    def spectral(self) -> bool | None:
        """Whether a spectral step beats a Euclidean one, to first order; None if unknown.

        References:
            arXiv 2512.04299: iff ‖G‖_*²/‖G‖_F² ≥ ‖A‖_F²/‖A‖₂².
        """
        return None if self.ratio is None else self.ratio >= 1

    @property
    def momentum(self) -> float | None:
        """β = 1 − 1/T_min: the smallest that reveals every direction that was visible."""
        if self.smallest_window is None:
            return None
        return max(0.0, 1 - 1 / self.smallest_window)


def observe(records: Iterable[dict[str, Any]]) -> list[Observed]:
    """Summarize the samples of each matrix.

    The earlier half is left out: averages are still filling up, and the learning rate warms up.

    Args:
        records: From :func:`~hf_muon.diagnostics.history.read_spectra`.

    Returns:
        A summary for each matrix, in the order of their first samples.

    Raises:
        ValueError: No sample has the nuclear rank of a gradient.
    """
    by_layer: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_layer[record["layer"]].append(record)
    found = [_observed(layer, samples) for layer, samples in by_layer.items()]
    if not any(one.nuclear_rank is not None for one in found):
        raise ValueError(
            "No sample of a gradient's nuclear rank is there. A run records them with "
            "Trainer(..., callbacks=[hf_muon.SpectralMonitor(layers='.', every=50)]), and must "
            "last for a sample or more."
        )
    return found


def _observed(layer: str, samples: Sequence[dict[str, Any]]) -> Observed:
    later = samples[len(samples) // 2 :]
    ratios = [
        sample["gradient_nuclear_rank"] / sample["input_stable_rank"]
        for sample in later
        if {"gradient_nuclear_rank", "input_stable_rank"} <= sample.keys()
    ]
    noise, signal = (
        sum(sample[name] for sample in later if {"noise_power", "signal_power"} <= sample.keys())
        for name in ("noise_power", "signal_power")
    )
    return Observed(
        layer=layer,
        samples=len(later),
        nuclear_rank=typical("gradient_nuclear_rank", later),
        input_rank=typical("input_stable_rank", later),
        ratio=median(ratios) if ratios else None,
        stable_rank=typical("gradient_stable_rank", later),
        visible_rank=typical("visible_rank", later),
        noise_to_signal=noise / signal if signal > 0 else None,
        smallest_window=typical("t_min", later),
    )


def euclidean_parameters(layers: Iterable[Observed]) -> list[str]:
    """Return parameters whose watched matrices all fail the criterion; unknown ones do not."""
    verdicts: dict[str, list[bool | None]] = defaultdict(list)
    for one in layers:
        verdicts[one.parameter].append(one.spectral)
    return [name for name, all_of in verdicts.items() if set(all_of) == {False}]


def patterns_of(names: Iterable[str]) -> tuple[str, ...]:
    r"""Return regexes that match these names and no others; one regex covers many layer numbers.

    ``^model\.layers\.(0|3)\.mlp\.up_proj\.weight$`` names two parameters.
    """
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        at = re.search(r"(?<=\.)\d+(?=\.)", name)
        around = (name[: at.start()], name[at.end() :]) if at else (name, "")
        numbers[around].append(at.group() if at else "")
    found = []
    for (before, after), inside in numbers.items():
        for start in range(0, len(inside), _MOST_NUMBERS):
            some = inside[start : start + _MOST_NUMBERS]
            middle = some[0] if len(some) == 1 else f"({'|'.join(some)})"
            found.append(f"^{re.escape(before)}{middle}{re.escape(after)}$")
    return tuple(found)
