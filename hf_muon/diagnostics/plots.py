"""A figure of the records of a SpectralMonitor.

In: ``spectra.jsonl``. Out: a PNG that plots over the steps of the run: the largest singular value
of the averaged gradient and the noise edge, the visible rank, the RMS of the updates, and the
orthogonality error of the polar factors. matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_muon.diagnostics.history import FILE_NAME, Record, read_spectra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with the common color-vision deficiencies; the wine of
# Paul Tol's palette replaces its black, which a dark page hides.
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#AA4466", "#999999",
)  # fmt: skip


def plot_spectra(path: str | Path, output: str | Path | None = None) -> Path:
    """Draw the samples of a run.

    Args:
        path: ``spectra.jsonl``, or the output folder that contains it.
        output: Image to write. Default: ``spectra.png`` beside the file.

    Returns:
        The path of the image.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It contains no samples.
        ImportError: matplotlib is not installed.

    Example:
        >>> plot_spectra("runs/tiny")
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    output = Path(output) if output else path.with_suffix(".png")
    figure = spectra_figure(read_spectra(path))
    figure.savefig(output, dpi=110, bbox_inches="tight")
    return output


def spectra_figure(samples: Sequence[Record]) -> Figure:
    """Return the figure, without writing an image.

    Args:
        samples: From :func:`~hf_muon.diagnostics.history.read_spectra`.

    Raises:
        ValueError: There are no samples.
        ImportError: matplotlib is not installed.
    """
    if not samples:
        raise ValueError("There are no samples to draw: the run ended before the first one.")
    figure = new_figure(10.5, 6.6)
    (sigma, rank), (size, quality) = figure.subplots(2, 2, sharex=True)
    layers = _by_layer(samples)
    for number, (color, (label, series)) in enumerate(zip(cycle(COLORS), layers, strict=False)):
        # Later lines are thinner, so that one on top of another leaves its rim visible.
        width = 3.2 - 2.2 * number / len(layers)
        _draw(sigma, series, "average_sigma_1", color=color, label=label, linewidth=width)
        _draw(sigma, series, "noise_edge", color=color, linestyle=":", marker="")
        _draw(rank, series, "visible_rank", color=color, linewidth=width)
        _draw(size, series, "update_rms", color=color, linewidth=width)
        _draw(quality, series, "orthogonality_error", color=color, linewidth=width)
    _titled(sigma, "largest singular value of M, and noise edge (dotted)", log=True)
    _titled(rank, "visible rank: singular values of M above the edge")
    _titled(size, "RMS of the update")
    _titled(quality, "orthogonality error of the polar factor")
    rank.set_ylim(top=max(1.0, rank.get_ylim()[1]))
    rank.yaxis.get_major_locator().set_params(integer=True)
    for axes in (size, quality):
        axes.set_xlabel("step")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; an ImportError says how to install matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures take matplotlib: python -m pip install matplotlib.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _by_layer(samples: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Group samples by layer; names lose the leading and trailing parts that all share."""
    names = list(dict.fromkeys(sample["layer"] for sample in samples))
    parts = [name.split(".") for name in names]
    begin, end = _shared(parts), _shared([part[::-1] for part in parts])
    return [
        (
            ".".join(part[begin : len(part) - end]) or name,
            [s for s in samples if s["layer"] == name],
        )
        for name, part in zip(names, parts, strict=True)
    ]


def _shared(parts: list[list[str]]) -> int:
    """Return how many leading parts all names have in common."""
    return next((i for i, at in enumerate(zip(*parts, strict=False)) if len(set(at)) > 1), 0)


def _draw(axes: Axes, series: list[Record], name: str, *, color: str, **style: Any) -> None:
    """Draw one quantity over the steps at which it was recorded."""
    there = [sample for sample in series if name in sample]
    steps, values = [s["step"] for s in there], [s[name] for s in there]
    axes.plot(steps, values, **{"color": color, "marker": ".", "linewidth": 1.2, **style})


def _titled(axes: Axes, title: str, *, log: bool = False) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
