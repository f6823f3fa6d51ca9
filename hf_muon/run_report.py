"""``hf-muon report RUN``: one page about a run.

In: the output folder of a Trainer, with what it and hf_muon leave there: ``trainer_state.json``,
``muon_report.json``, ``spectra.jsonl``. Out: one HTML file with its figures inside. What is missing
is named on the page.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; color: #222; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; font-size: 13px; }}
td, th {{ padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid #e6e6e6; }}
.missing {{ color: #8a8a8a; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def report(
    run: Annotated[Path, typer.Argument(help="The output folder of a Trainer.")],
    output: Annotated[Path | None, typer.Option(help="Default: report.html in the folder.")] = None,
) -> None:
    """Write an HTML page about a run: losses, learning rates, spectra, routes."""
    try:
        path = write_run_report(run, output)
    except (FileNotFoundError, ValueError, ImportError) as error:
        typer.echo(f"hf-muon: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(path)


def write_run_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page.

    Args:
        run: The ``output_dir`` of a Trainer.
        output: File to write. Default: ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The folder holds nothing that a run leaves.
        ImportError: matplotlib is not installed.
        ValueError: A file in it is damaged.
    """
    run = Path(run)
    state, about = _newest_state(run), _json(run / "muon_report.json")
    if not (state or about or (run / "spectra.jsonl").is_file()):
        raise FileNotFoundError(
            f"{run} holds no trainer_state.json, muon_report.json or spectra.jsonl: give the "
            "output_dir of a Trainer."
        )
    history = state.get("log_history", [])
    no_history = (
        "No trainer_state.json: the Trainer writes it with each checkpoint, or save_state()."
    )
    sections = [
        f"<p>{escape(about['optimizer'])}.</p>" if about else "",
        _section("Losses", _curves(history, ("loss", "eval_loss"), "loss"), no_history),
        _section(
            "Learning rates",
            _curves(history, ("learning_rate", "adamw/lr"), "learning rate"),
            no_history,
        ),
        *_spectra(run),
        _section("Routes", _routes(about), "No muon_report.json: another optimizer trained."),
        _section("Versions", _table(["package", "version"], about.get("versions", {}).items()), ""),
    ]
    path = Path(output) if output else run / "report.html"
    page = _PAGE.format(title=escape(f"Run {run.resolve().name}"), body="\n".join(sections))
    path.write_text(page, encoding="utf-8")
    return path


def _newest_state(run: Path) -> dict[str, Any]:
    """The ``trainer_state.json`` of the latest step, in the folder or one of its checkpoints."""
    found = [run / "trainer_state.json", *run.glob("checkpoint-*/trainer_state.json")]
    states = [state for path in found if (state := _json(path))]
    return max(states, key=lambda state: int(state.get("global_step", 0)), default={})


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it does not exist."""
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    return content


def _section(title: str, content: str, missing: str) -> str:
    """A heading, and what stands below it or why nothing does."""
    if not content and not missing:
        return ""
    return f"<h2>{title}</h2>\n" + (content or f'<p class="missing">{escape(missing)}</p>')


def _curves(history: Sequence[dict[str, Any]], names: Sequence[str], label: str) -> str:
    """Logged values over steps, as an image; nothing if none of them was logged."""
    series = {
        name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names
    }
    if not any(series.values()):
        return ""

    def draw(axes: Axes) -> None:
        for name, points in series.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker=".")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)

    return _image(_figure(draw), label)


def _figure(draw: Callable[[Axes], None]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Figures take matplotlib: python -m pip install 'hf-muon[recipes]'."
        ) from error
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    draw(figure.subplots())
    return figure


def _image(figure: Figure, description: str) -> str:
    """A figure inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{encoded}">'


def _spectra(run: Path) -> list[str]:
    """The samples of a SpectralMonitor, and what it warned of."""
    from hf_muon.diagnostics.history import FILE_NAME, read_spectra, read_warnings
    from hf_muon.diagnostics.plots import spectra_figure

    path = run / FILE_NAME
    there = path.is_file()
    samples = read_spectra(path) if there else []
    image = _image(spectra_figure(samples), "spectra") if samples else ""
    rows = [(w["step"], w["layer"], w["warning"]) for w in read_warnings(path)] if there else []
    return [
        _section("Spectra", image, f"No samples in {FILE_NAME}: no SpectralMonitor watched."),
        _section("Warnings", _table(["step", "layer", "warning"], rows), ""),
    ]


def _routes(about: dict[str, Any]) -> str:
    """The routing table; nothing where a model was not routed."""
    routes = (about.get("routing") or {}).get("routes", [])
    rows = [
        (r["name"], " × ".join(map(str, r["shape"])), r["algorithm"], r["reason"]) for r in routes
    ]
    return _table(["parameter", "shape", "algorithm", "reason"], rows)


def _table(head: Sequence[str], rows: Any) -> str:
    """An HTML table; nothing if it has no rows."""
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<tr>{heads}</tr>\n{body}\n</table>"
