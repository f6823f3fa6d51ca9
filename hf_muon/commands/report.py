"""``hf-muon report RUN``: one page about a run.

In: the output folder of a Trainer, with what it and hf_muon leave there: ``trainer_state.json`` (or
a recipe's ``results.json``), ``muon_report.json``, ``spectra.jsonl``. Out: one HTML file with its
figures inside. What is missing is named on the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_muon.diagnostics.history import FILE_NAME, read_spectra, read_warnings
from hf_muon.diagnostics.plots import new_figure, spectra_figure
from hf_muon.values import near_path, read_json, sentence

if TYPE_CHECKING:
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
    typer.echo(write_run_report(run, output))


def write_run_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page.

    Args:
        run: The ``output_dir`` of a Trainer.
        output: File to write. Default: ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is no such folder, or it holds nothing that a run leaves.
        ImportError: matplotlib is not installed.
        ValueError: A file in it is damaged.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"There is no folder {str(run)!r}.{near_path(run)}")
    history, about = _history(run), _json(run / "muon_report.json")
    if history is None and not about and not (run / FILE_NAME).is_file():
        inside = [str(path.parent) for path in sorted(run.glob("*/muon_report.json"))]
        raise FileNotFoundError(
            f"{run} holds no trainer_state.json, muon_report.json or {FILE_NAME}: give the "
            f"output_dir of a Trainer{', such as ' + inside[0] if inside else ''}."
        )
    no_history = (
        "No trainer_state.json: the Trainer writes it with each checkpoint, or save_state()."
    )
    with _reading(run / "muon_report.json"):
        optimizer = f"<p>{escape(about['optimizer'])}.</p>" if about else ""
        routes = _routes(about)
        versions = _table(["package", "version"], about.get("versions", {}).items())
    losses = _curves(history or [], ("loss", "eval_loss"), "loss")
    rates = _curves(history or [], ("learning_rate", "adamw/lr"), "learning rate")
    sections = [
        optimizer,
        _section("Losses", losses, no_history),
        _section("Learning rates", rates, no_history),
        *_spectra(run),
        _section("Routes", routes, "No muon_report.json: another optimizer trained."),
        _section("Versions", versions, ""),
    ]
    path = Path(output) if output else run / "report.html"
    page = _PAGE.format(title=escape(f"Run {run.resolve().name}"), body="\n".join(sections))
    path.write_text(page, encoding="utf-8")
    return path


def _history(run: Path) -> list[dict[str, float]] | None:
    """What was logged: by the state of the latest step, else in a recipe's results."""
    found: tuple[int, list[dict[str, float]]] | None = None
    for path in (run / "trainer_state.json", *run.glob("checkpoint-*/trainer_state.json")):
        with _reading(path):
            state = _json(path)
            step = int(state.get("global_step", 0))
            if state and (found is None or step > found[0]):
                found = step, _numbers(state["log_history"])
    if found is not None:
        return found[1]
    with _reading(run / "results.json"):
        results = _json(run / "results.json")
        curve = results.get("eval_curve", [])
        evaluated = [{"step": point["step"], "eval_loss": point["loss"]} for point in curve]
        return _numbers([*results.get("train_curve", []), *evaluated]) if results else None


def _numbers(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The entries of a log, without what is no number."""
    return [
        {"step": int(entry["step"])}
        | {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for entry in history
    ]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever content of another form makes Python raise into one sentence."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} does not hold what a run leaves there: {type(error).__name__}, "
            f"{sentence(error)}"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    """The object that a file holds; empty if there is no file."""
    return read_json(path) if path.is_file() else {}


def _section(title: str, content: str, missing: str) -> str:
    """A heading, and what stands below it or why nothing does."""
    if not content and not missing:
        return ""
    return f"<h2>{title}</h2>\n" + (content or f'<p class="missing">{escape(missing)}</p>')


def _curves(history: Sequence[dict[str, float]], names: Sequence[str], label: str) -> str:
    """Logged values over steps, as an image; nothing if none of them was logged."""
    series = {
        name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names
    }
    if not any(series.values()):
        return ""
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for name, points in series.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _image(figure, label)


def _image(figure: Figure, description: str) -> str:
    """A figure inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{encoded}">'


def _spectra(run: Path) -> list[str]:
    """The samples of a SpectralMonitor, and what it warned of."""
    path = run / FILE_NAME
    there = path.is_file()
    with _reading(path):
        samples = read_spectra(path) if there else []
        image = _image(spectra_figure(samples), "spectra") if samples else ""
        warned = read_warnings(path) if there else []
        rows = [(one["step"], one["layer"], one["warning"]) for one in warned]
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
