"""What momentum filters remember, and how much noise they leave: the figure of docs/filters.md.

In: names of files. Out: an image of two panels. Left: the impulse responses, that is, the weight in
the output of the gradient j steps ago. Right: the singular values of the output on a signal of rank
4 in white noise, after many steps, and the edge at which the noise ends: √(Σ h_j²)·σ(√m + √n).

    python scripts/bench/filter_figure.py docs/images/filters.png
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hf_muon.diagnostics.kernels import impulse_response, mean_age, noise_factor
from hf_muon.diagnostics.synthetic import spiked_stream

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from shared.style import COLORS, INK, MUTED, plt, tidy

SHAPE, STRENGTHS = (96, 128), (1.0, 0.6, 0.35, 0.2)
SIGMA = 1 / math.sqrt(SHAPE[0])
STEPS, SHOWN_LAGS, SHOWN_VALUES = 500, 60, 16  # 0.98^500 = 4e-5: nothing is left of the start


@dataclass(frozen=True)
class Kernel:
    """A filter and its style in the figure."""

    name: str
    betas: tuple[float, ...]
    weights: tuple[float, ...]
    nesterov: bool
    color: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]


KERNELS = (
    Kernel("EMA 0.95", (0.95,), (1.0,), False, COLORS[1], "o", "-"),
    Kernel("EMA 0.95, Nesterov (default)", (0.95,), (1.0,), True, INK, "D", "--"),
    Kernel("two terms: 0.9, 0.98", (0.9, 0.98), (0.44, 0.56), False, COLORS[0], "s", "-."),
    Kernel("four terms: 0.8 … 0.98", (0.8, 0.9, 0.95, 0.98), (0.25,) * 4, False, COLORS[2], "^",
           (0, (1, 1.2))),
)  # fmt: skip


def outputs(gradients: Tensor) -> list[Tensor]:
    """Return the output of each filter after the last of the gradients (K, m, n)."""
    recent = gradients.flip(0)
    found = []
    for kernel in KERNELS:
        h = impulse_response(kernel.betas, kernel.weights, kernel.nesterov, len(recent))
        found.append(torch.tensordot(torch.tensor(h, dtype=recent.dtype), recent, dims=1))
    return found


def edge(factor: float) -> float:
    """Return the largest singular value of white noise with a given share of its variance left."""
    return math.sqrt(factor) * SIGMA * sum(math.sqrt(side) for side in SHAPE)


def draw_responses(axes: plt.Axes) -> None:
    """Draw the weight of each gradient; the legend gives the mean age of the filter's inputs."""
    for kernel in KERNELS:
        of = kernel.betas, kernel.weights, kernel.nesterov
        response, age = impulse_response(*of, SHOWN_LAGS), mean_age(*of)
        axes.plot(response, color=kernel.color, ls=kernel.line, lw=1.8,
                  label=f"{kernel.name}: mean age {age:.1f}")  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(3e-3, 0.13)
    axes.set_yticks([0.003, 0.01, 0.03, 0.1], ["0.003", "0.01", "0.03", "0.1"])
    axes.yaxis.set_minor_locator(plt.NullLocator())
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    tidy(axes, "lag j, in steps", "weight $h_j$ of the gradient", "What the filter remembers")


def draw_spectra(axes: plt.Axes) -> None:
    """Draw singular values of one gradient and of each output, with the edges of the noise."""
    stream = spiked_stream(*SHAPE, STRENGTHS, steps=STEPS, sigma=SIGMA)
    gradients = torch.stack([step.gradient for step in stream])
    numbers = range(1, SHOWN_VALUES + 1)

    def values(matrix: Tensor) -> list[float]:
        return [float(value) for value in torch.linalg.svdvals(matrix)[:SHOWN_VALUES]]

    axes.plot(numbers, values(gradients[-1]), color=MUTED, marker="x", ms=5, lw=1,
              label=f"one gradient: edge {edge(1):.2f}")  # fmt: skip
    axes.axhline(edge(1), color=MUTED, lw=0.8, ls=":")
    for kernel, output in zip(KERNELS, outputs(gradients), strict=True):
        end = edge(noise_factor(kernel.betas, kernel.weights, kernel.nesterov))
        axes.plot(numbers, values(output), color=kernel.color, marker=kernel.marker, ms=4, lw=1,
                  label=f"{kernel.name}: edge {end:.2f}")  # fmt: skip
        axes.axhline(end, color=kernel.color, lw=0.8, ls=":")
    axes.plot(
        numbers[: len(STRENGTHS)],
        STRENGTHS,
        "_",
        color=INK,
        ms=16,
        mew=1.5,
        label="the signal alone",
    )
    axes.set_yscale("log")
    axes.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    axes.yaxis.set_minor_locator(plt.NullLocator())
    axes.legend(frameon=False, fontsize=9)
    axes.set_ylim(0.17, 2.6)
    title = "What it leaves of the noise (dotted: where noise ends)"
    tidy(axes, "number of the singular value", "singular value", title)


def figure() -> plt.Figure:
    """Return the figure."""
    made, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw_responses(left)
    draw_spectra(right)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Read the name of the file and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="PNG file")
    out = parser.parse_args(argv).out
    image = io.BytesIO()
    figure().savefig(image, format="png", dpi=110)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Few colors make the file a third of the size.
    few = Image.open(image).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    few.save(out, optimize=True)


if __name__ == "__main__":
    main()
