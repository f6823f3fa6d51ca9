"""The files of a run, as far as a report page shows them.

In: the ``output_dir`` of a Trainer: ``trainer_state.json`` (its own or that of the latest
checkpoint), a recipe's ``results.json``, ``muon_report.json``, ``spectra.jsonl``, ``config.json``.
Out: a :class:`Run`. Missing values are None or empty; a damaged file raises an error of one
sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_muon.diagnostics.history import FILE_NAME, Record, read_spectra, read_warnings
from hf_muon.shown import count
from hf_muon.values import near_path, read_json, sentence

STATE, RESULTS, REPORT = "trainer_state.json", "results.json", "muon_report.json"
FILES = (STATE, RESULTS, REPORT, FILE_NAME)
"""A folder with any of these files is the folder of a run."""
NOT_RECORDED = "not recorded"
Points = list[tuple[float, float]]


@dataclass
class Run:
    """A run, as its files describe it.

    Attributes:
        folder: Its folder.
        logged: Logged values by name, as (step, value); finite values only.
        step: Number of steps taken.
        max_steps: Number of steps planned.
        tokens: Number of tokens trained on.
        tokens_per_step: Tokens per step.
        seconds: Wall time of the training, or of the whole run if only that is known.
        speed: Tokens per second.
        share: The optimizer's share of the step time.
        state_bytes: Bytes of optimizer state in the first process.
        final: The last validation loss; on all held-out data if the run measured that.
        joules: Energy by the processor's counters (RAPL).
        cpu_seconds: CPU time over all cores.
        model: The model in a few words.
        data: The data in a few words.
        optimizer: The optimizer in one sentence.
        optim: The Trainer's ``optim``.
        config: Settings of Muon.
        rates: Learning rates of the matrices, and of everything else.
        routes: The routing table.
        versions: Versions by package.
        samples: Samples of a SpectralMonitor.
        warned: Warnings of a SpectralMonitor.
        has_history: Whether a file with logged values exists.
    """

    folder: Path
    logged: dict[str, Points] = field(default_factory=dict)
    step: int | None = None
    max_steps: int | None = None
    tokens: float | None = None
    tokens_per_step: float | None = None
    seconds: float | None = None
    speed: float | None = None
    share: float | None = None
    state_bytes: float | None = None
    final: float | None = None
    joules: float | None = None
    cpu_seconds: float | None = None
    model: str | None = None
    data: str | None = None
    optimizer: str | None = None
    optim: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float | None, float | None] = (None, None)
    routes: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    samples: list[Record] = field(default_factory=list)
    warned: list[Record] = field(default_factory=list)
    has_history: bool = False

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def last(self, name: str) -> float | None:
        """Return the last value logged under a name; None if there is none."""
        points = self.logged.get(name)
        return points[-1][1] if points else None

    def steps_to(self, target: float, name: str) -> float | None:
        """Return the step at which a logged loss reaches a target; None if it never does.

        Between logged steps the loss is interpolated linearly.
        """
        points = self.logged.get(name, [])
        if points and points[0][1] <= target:
            return points[0][0]
        for (step, loss), (after, lower) in pairwise(points):
            if lower <= target:
                return step + (loss - target) / (loss - lower) * (after - step)
        return None


def is_run(folder: Path) -> bool:
    """Return whether a folder contains files of a run."""
    return any((folder / name).is_file() for name in FILES) or any(_states(folder))


def runs_inside(folder: Path) -> list[Path]:
    """Return the folders of runs directly inside a folder."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]


def read_run(folder: str | Path) -> Run:
    """Read the files of a run.

    Raises:
        FileNotFoundError: The folder does not exist, or contains no file of a run.
        ValueError: A file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.{near_path(folder)}")
    if not is_run(folder):
        inside = runs_inside(folder)
        raise FileNotFoundError(
            f"{folder} holds no {', '.join(FILES[:-1])} or {FILES[-1]}: give the output_dir of a "
            f"Trainer{f', such as {inside[0]}' if inside else ''}."
        )
    run = Run(folder)
    configs = (folder / "config.json", *sorted(folder.glob("checkpoint-*/config.json")))
    parts = (
        (_read_report, [folder / REPORT]),
        (_read_state, [folder / STATE, *_states(folder)]),
        (_read_results, [folder / RESULTS]),
        (_read_config, [path for path in configs if path.is_file()][:1]),
    )
    for read, paths in parts:
        for path in filter(Path.is_file, paths):
            with reading(path):
                read(run, read_json(path))
    path = folder / FILE_NAME
    if path.is_file():
        with reading(path):
            run.samples, run.warned = read_spectra(path), read_warnings(path)
            for one in (*run.samples, *run.warned):
                int(one["step"]), one["layer"]
    if run.tokens_per_step is None and run.tokens and run.step:
        run.tokens_per_step = run.tokens / run.step
    if run.final is None:
        run.final = run.last("eval_loss")
    return run


def _states(folder: Path) -> Iterator[Path]:
    yield from folder.glob(f"checkpoint-*/{STATE}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors from unexpected content into a ValueError of one sentence that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} does not hold what a run leaves there: {type(error).__name__}, "
            f"{sentence(error)}"
        ) from error


def _read_report(run: Run, about: dict[str, Any]) -> None:
    run.optimizer = f"{about['optimizer'].removesuffix('.')}."
    run.config = dict(about.get("config") or {})
    run.routes = [
        {**route, "shape": list(map(int, route["shape"])), "name": str(route["name"])}
        for route in (about.get("routing") or {}).get("routes", [])
    ]
    run.versions = {str(name): str(text) for name, text in about.get("versions", {}).items()}
    by = {group["algorithm"]: float(group["lr"]) for group in about.get("groups", [])[::-1]}
    run.rates = (by.get("muon"), by.get("adamw"))
    trained = sum(math.prod(route["shape"]) for route in run.routes)
    if trained:
        run.model = f"{count(trained)} trained parameters in {len(run.routes)} tensors"


def _read_state(run: Run, state: dict[str, Any]) -> None:
    """Read the logged values from a Trainer's state, unless one of a later step was read."""
    step, history = int(state.get("global_step", 0)), state["log_history"]
    logged = _logged(history)
    if run.step is not None and step <= run.step:
        return
    run.has_history, run.logged, run.step = True, logged, step
    run.max_steps = int(_number(state.get("max_steps")) or 0) or None
    run.tokens = _number(state.get("num_input_tokens_seen")) or None
    seconds = [_number(one.get("train_runtime")) for one in history]
    run.seconds = next((s for s in reversed(seconds) if s is not None), None)


def _logged(history: Sequence[dict[str, Any]]) -> dict[str, Points]:
    """Return logged values by name; a resumed run logs a step twice, and the last value counts."""
    found: dict[str, dict[float, float]] = {}
    for entry in history:
        step = int(entry["step"])
        for name, value in entry.items():
            number = _number(value)
            if number is not None and name != "step":
                found.setdefault(name, {})[step] = number
    return {name: sorted(points.items()) for name, points in found.items()}


def _read_results(run: Run, found: dict[str, Any]) -> None:
    """Read a recipe's results: sizes and times, and curves if the Trainer's state is missing."""
    curves = {"loss": found.get("train_curve", []), "eval_loss": found.get("eval_curve", [])}
    read = {
        name: [(int(one["step"]), float(one["loss"])) for one in curve]
        for name, curve in curves.items()
    }
    if not run.has_history:
        run.has_history = "train_curve" in found or "eval_curve" in found
        run.logged = {name: sorted(points) for name, points in read.items() if points}
    numbers = {name: _number(value) for name, value in found.items()}
    run.step = run.step or int(numbers.get("steps") or 0) or None
    run.tokens = numbers.get("tokens") or run.tokens
    run.seconds = run.seconds or numbers.get("wall_seconds")
    run.speed, run.share = numbers.get("tokens_per_second"), numbers.get("optimizer_share")
    run.state_bytes = numbers.get("optimizer_state_bytes")
    run.joules, run.cpu_seconds = numbers.get("joules"), numbers.get("cpu_seconds")
    run.final = numbers.get("final_validation_loss", numbers.get("validation_loss"))
    run.optim = str(found["optim"]) if "optim" in found else None
    if run.optimizer is None and run.optim:
        rate, other = numbers.get("learning_rate"), numbers.get("other_learning_rate")
        run.rates = (rate, rate if other is None else other)
        run.optimizer = _other_optimizer(run.optim, rate, other)
    run.model = _model(found, numbers) or run.model
    run.data = _data(found)
    if not run.versions:
        versions = found.get("versions") or {}
        run.versions = {str(name): str(text) for name, text in versions.items() if text}


def _other_optimizer(optim: str, rate: float | None, other: float | None) -> str:
    text = f"{optim}, the Trainer's"
    if rate is not None:
        text += f", with lr={rate:g}"
    if other is not None:
        text += f" for the hidden matrices and lr={other:g} for all other parameters"
    return f"{text}."


def _model(found: dict[str, Any], numbers: dict[str, float | None]) -> str | None:
    shape = found.get("model") or {}
    words = [str(shape[key]) for key in ("name", "model_name_or_path", "model") if key in shape]
    if "num_hidden_layers" in shape and "hidden_size" in shape:
        words.append(f"{shape['num_hidden_layers']} layers of width {shape['hidden_size']}")
    size = _number(shape.get("parameters", numbers.get("parameters")))
    if size:
        words.append(f"{count(int(size))} parameters")
    trained = numbers.get("trained_parameters")
    if trained:
        words.append(f"{count(int(trained))} of them trained")
    return ", ".join(words) or None


def _data(found: dict[str, Any]) -> str | None:
    data = found.get("data") or {}
    words = [str(data["corpus"])] if data.get("corpus") else []
    if "seq_len" in data:
        words.append(f"sequences of {data['seq_len']} tokens")
    held = _number(data.get("validation_tokens"))
    if held:
        words.append(f"{count(int(held))} tokens held out")
    rows, held = _number(found.get("train_rows")), _number(found.get("validation_rows"))
    if rows and held:
        words.append(f"{int(rows):,} rows, {int(held):,} held out")
    return ", ".join(words) or None


def _read_config(run: Run, config: dict[str, Any]) -> None:
    """Read the name of the architecture from the model's configuration."""
    names = config.get("architectures") or []
    if names:
        run.model = ", ".join(filter(None, (str(names[0]), run.model)))


def _number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float(value)  # too large an integer raises OverflowError: the file is damaged
    return number if math.isfinite(number) else None
