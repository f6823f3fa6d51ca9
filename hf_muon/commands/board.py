"""``hf-muon report --board RUNS…``: one page about several runs.

In: output folders of Trainers, or folders that contain some. Out: one HTML file: the loss, tokens,
time and energy of each run, and all loss curves in one figure. A number that a run did not record
is shown as not recorded, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_muon.commands import page
from hf_muon.commands.curves import curves
from hf_muon.commands.runs import FILES, NOT_RECORDED, Run, is_run, read_run, runs_inside
from hf_muon.shown import count, megabytes

RESULTS = ("tokens", "tokens to target", "steps to target")
SETTINGS = ("run", "optimizer", "order", "β", "rate of matrices", "rate of the rest")
COSTS = ("run", "time", "optimizer's share", "optimizer's state", "energy")


def write_board(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    target: float | None = None,
    watts_per_core: float | None = None,
    title: str = "Runs",
    conclusion: str = "",
) -> Path:
    """Write the page about several runs.

    Args:
        folders: Output folders of Trainers. A folder that is not one stands for all output folders
            directly inside it.
        output: File to write. Default: ``board.html`` beside the runs.
        target: The loss to reach. Default: the highest of the runs' last losses, which each of
            them reaches.
        watts_per_core: Power of a busy core, in watts, to estimate the energy of runs that could
            not read the processor's counters. Default: no estimate.
        title: Title of the page.
        conclusion: A sentence above the table.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: A folder does not exist, or contains no run.
        ImportError: matplotlib is not installed.
        ValueError: A file is damaged, a run is given twice, or a number is out of range.
    """
    if watts_per_core is not None and not watts_per_core > 0:
        raise ValueError(f"watts_per_core={watts_per_core:g}: a number above 0 is expected.")
    runs = [read_run(path) for path in _expanded([Path(folder) for folder in folders])]
    names = _names(runs)
    kind = "eval_loss" if all(run.logged.get("eval_loss") for run in runs) else "loss"
    ends = [end for run in runs if (end := run.last(kind)) is not None]
    goal = target if target is not None else max(ends, default=None)
    results = [(name, *_results(run, kind, goal)) for name, run in names.items()]
    settings = [(name, *_settings(run)) for name, run in names.items()]
    costs = [(name, *_costs(run, watts_per_core)) for name, run in names.items()]
    by_tokens = all(run.tokens_per_step for run in runs)
    series = {name: _points(run, kind, by_tokens=by_tokens) for name, run in names.items()}
    what = "validation loss" if kind == "eval_loss" else "training loss"
    drawn = curves(series, what, "tokens" if by_tokens else "step", cut_begin=True)
    parts = [
        page.text(conclusion) if conclusion else "",
        page.facts(_common(runs)),
        page.section("Losses", page.figures([(drawn, "")]), _nothing(runs)),
        page.section(
            "Results",
            page.table(("run", f"last {what}", *RESULTS), results)
            + page.note(_legend(kind, goal, target)),
        ),
        page.section("Settings", page.table(SETTINGS, settings)),
        page.section("Costs", page.table(COSTS, costs) + page.note(_ENERGY)),
    ]
    path = Path(output) if output else _beside(runs) / "board.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.page(title, parts), encoding="utf-8")
    return path


def _expanded(folders: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for folder in folders:
        inside = runs_inside(folder) if folder.is_dir() and not is_run(folder) else []
        found += inside or [folder]  # read_run raises if it is no run
    return list(dict.fromkeys(found))


def _names(runs: Sequence[Run]) -> dict[str, Run]:
    """Name each run by the last part of its path, or by as many parts as make names differ."""
    paths = [run.folder.resolve().parts for run in runs]
    for parts in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len({*names}) == len(names):
            return dict(zip(names, runs, strict=True))
    raise ValueError("A run is given twice.")


def _results(run: Run, kind: str, goal: float | None) -> tuple[str, ...]:
    steps = run.steps_to(goal, kind) if goal is not None else None
    if steps is None:
        never = "never" if goal is not None and run.logged.get(kind) else NOT_RECORDED
        reached = never, never
    else:
        per_step = run.tokens_per_step
        tokens = count(int(steps * per_step)) if per_step else NOT_RECORDED
        reached = tokens, f"{steps:,.0f}"
    last = run.final if kind == "eval_loss" else run.last("loss")
    trained = count(int(run.tokens)) if run.tokens else NOT_RECORDED
    return _shown(last, "{:.4f}"), trained, *reached


def _settings(run: Run) -> tuple[str, ...]:
    optim = run.optim or ("muon" if run.config else NOT_RECORDED)
    order = str(run.config.get("order", "–"))
    return optim, order, _beta(run.config), *(_shown(rate, "{:g}") for rate in run.rates)


def _costs(run: Run, watts: float | None) -> tuple[str, ...]:
    return (
        _shown(run.seconds, "{:,.0f} s"),
        _shown(run.share, "{:.1%}"),
        megabytes(run.state_bytes) if run.state_bytes else NOT_RECORDED,
        _energy(run, watts),
    )


def _beta(config: dict[str, Any]) -> str:
    if not config or config.get("order") == "polar_only":
        return "–"
    beta = config.get("momentum", "–")
    return ":".join(f"{one:g}" for one in beta) if isinstance(beta, list) else str(beta)


def _energy(run: Run, watts: float | None) -> str:
    """Return the measured energy, or an estimate marked as one; never a guess."""
    if run.joules is not None:
        return f"{run.joules / 1e3:.3g} kJ (RAPL)"
    if run.cpu_seconds is None:
        return NOT_RECORDED
    if watts is None:
        seconds = run.cpu_seconds
        return f"{seconds:,.0f} s of CPU" if seconds >= 10 else f"{seconds:.2g} s of CPU"
    return f"≈ {run.cpu_seconds * watts / 1e3:.3g} kJ (estimate)"


def _shown(value: float | None, form: str) -> str:
    return NOT_RECORDED if value is None else form.format(value)


def _points(run: Run, kind: str, *, by_tokens: bool) -> list[tuple[float, float]]:
    scale = (run.tokens_per_step or 1.0) if by_tokens else 1.0
    return [(step * scale, loss) for step, loss in run.logged.get(kind, [])]


def _common(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the model and the data that all runs share, or say that they differ."""
    facts = {"Model": [run.model for run in runs], "Data": [run.data for run in runs]}
    rows = []
    for name, values in facts.items():
        known = [value for value in values if value]
        longest = max(known, key=len, default=NOT_RECORDED)  # some runs describe it in more detail
        alike = all(longest.startswith(value) for value in known)
        shown = longest if alike else "not the same in all runs"
        unsaid = bool(known) and len(known) < len(values)
        rows.append((name, f"{shown} (some runs do not say)" if unsaid else shown))
    return rows


def _nothing(runs: Sequence[Run]) -> str:
    files = f"{', '.join(FILES[:-1])} and {FILES[-1]}"
    return f"None of the {len(runs)} runs has logged a loss. Looked for {files} in each of them."


def _legend(kind: str, goal: float | None, target: float | None) -> str:
    what = "validation" if kind == "eval_loss" else "training"
    text = "Nothing was logged, so that there is no target."
    if goal is not None:
        whose = "" if target is not None else ", the highest of the runs' last ones"
        text = (
            f"Target: {what} loss {goal:.4f} on the curve{whose}; between its points interpolated."
        )
    return (
        f"{text} Schedules decay over the whole run: a run that was planned to end at the target "
        "would reach it sooner. Last validation loss: on all held-out data where a run measured it."
    )


_ENERGY = (
    "Energy: the processor's counters (RAPL, which count all processes of the machine) where a run "
    "could read them; else CPU time, and with --watts-per-core an estimate from it."
)


def _beside(runs: Sequence[Run]) -> Path:
    parents = {run.folder.resolve().parent for run in runs}
    return runs[0].folder.parent if len(parents) == 1 else Path()
