"""The study harness: searches end between worse neighbors, trainings are kept, seeds paired."""

import json
import math
import subprocess
import sys
import textwrap
import time

import pytest

from tests.integration.recipes import RECIPES

sys.path.append(str(RECIPES))

from study import command, figures, paired, tables
from study.descent import best_point, neighbors, next_points
from study.harness import Arm, Plan, study
from study.records import Records, Run, append, read

CELL = {"steps": 8}
START = {"rate": 1.0, "other": 1.0, "beta": 0.9}
AXES = {"rate": 2.0, "other": 2.0, "beta": (0.0, 0.9, 0.95)}


def valley(rate, other, beta):
    """A loss whose best rate moves with the other one: a single sweep does not find it."""
    x, y = math.log2(rate), math.log2(other)
    return (x - 2) ** 2 + (y - 3) ** 2 - 0.9 * (x - 2) * (y - 3) + abs(beta - 0.95)


def descended(loss, start, axes, most=1000):
    """All points that a search tries, in order."""
    losses = {}
    while (points := next_points(losses, [start], axes)) and len(losses) < most:
        losses |= {point: loss(*point) for point in points}
    return losses


# --- the search -----------------------------------------------------------------------------------


def test_the_search_ends_where_no_neighbor_is_better():
    losses = descended(valley, (1.0, 1.0, 0.9), tuple(AXES.values()))
    assert best_point(losses) == (4.0, 8.0, 0.95)
    best = losses[4.0, 8.0, 0.95]
    for number, axis in enumerate(AXES.values()):
        for value in neighbors(best_point(losses)[number], axis):
            beside = list(best_point(losses))
            beside[number] = value
            assert losses[tuple(beside)] >= best
    assert len(losses) < 30  # of a grid of hundreds


def test_a_line_is_followed_to_its_end_before_the_next():
    far = descended(
        lambda x, y: math.log2(x) ** 2 + (math.log2(y) - 3) ** 2, (1.0, 1.0), (2.0, 2.0)
    )
    assert [*far][:7] == [(1, 1), (0.5, 1), (2, 1), (1, 0.5), (1, 2), (1, 4), (1, 8)]
    assert [*far][7:] == [(1, 16), (0.5, 8), (2, 8)]


def test_one_coordinate_is_a_grid_that_grows_at_its_edge():
    assert next_points({(1.0,): 3.0, (2.0,): 2.0, (4.0,): 1.0}, [(1.0,)], [2.0]) == [(8.0,)]
    assert next_points({(1.0,): 3.0, (2.0,): 1.0, (4.0,): 2.0}, [(1.0,)], [2.0]) == []
    assert next_points({}, [(1.0,), (3.0,)], [2.0]) == [(1.0,), (3.0,)]
    assert next_points({(0.0,): 1.0}, [(0.0,)], [2.0]) == []  # a factor does not leave zero
    flat = descended(lambda x, y: abs(x - 4), (1.0, 1.0), (2.0, 2.0))
    assert best_point(flat) == (4.0, 1.0)  # a coordinate without effect is not followed
    lost = {(1.0,): math.inf, (2.0,): math.inf}
    assert next_points(lost, [(1.0,)], [2.0]) == [(0.5,)]  # where all diverged, downwards


def test_a_grid_is_tried_before_the_search_begins():
    arm = Arm({}, {"rate": 1.0}, {"rate": 2.0}, [{"rate": 2.0}, {"rate": 4.0}])
    plan, train = Plan("a", arm, CELL, (1,)), []

    def falls(run):
        train.append(run.point["rate"])
        return {"loss": abs(math.log2(run.point["rate"]) - 4), "seconds": 0.0}

    study(Records(), [plan], falls)
    assert train == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 16.0]


def test_values_that_are_listed_have_two_neighbors_and_ends():
    assert neighbors(0.9, (0.0, 0.9, 0.95)) == [0.0, 0.95]
    assert neighbors(0.95, (0.0, 0.9, 0.95)) == [0.9]
    assert neighbors(0.95, None) == []


# --- trainings that are kept ----------------------------------------------------------------------


class Invented:
    """Trainings that take no time and are counted."""

    def __init__(self):
        self.runs = []

    def __call__(self, run):
        self.runs.append(run)
        point = run.point
        loss = valley(*point.values()) + run.seed * run.settings.get("per_seed", 0.01)
        return {"loss": None if point["rate"] > 64 else loss, "seconds": 1.0}


def plans(budget=100, seeds=(1, 2, 3), **changes):
    fixed = Arm({}, {**START, **changes}, {})
    arms = {"fixed": fixed, "a": Arm({"per_seed": 0.02}, START, AXES), "b": Arm({}, START, AXES)}
    return [Plan(name, arm, CELL, seeds, budget=budget) for name, arm in arms.items()]


def test_a_study_trains_what_is_not_searched_first_then_searches_then_seeds_of_all_arms(tmp_path):
    train, records = Invented(), Records(tmp_path / "runs.jsonl")
    study(records, plans(), train)
    stages = [(run.arm, run.seed) for run in train.runs]
    assert stages[:3] == [("fixed", 1), ("fixed", 2), ("fixed", 3)]
    assert stages[-6:] == [(arm, seed) for seed in (1, 2, 3) for arm in "ab"]
    assert {seed for _, seed in stages[3:-6]} == {0}
    assert len({run.key for run in train.runs}) == len(train.runs) == len([*records])
    study(Records(tmp_path / "runs.jsonl"), plans(), train)
    assert len(train.runs) == len([*records])  # all stood in the file
    study(Records(tmp_path / "runs.jsonl"), plans(seeds=(1, 2, 3, 4)), train)
    assert stages_of(train.runs[len(stages) :]) == [("fixed", 4), ("a", 4), ("b", 4)]


def stages_of(runs):
    return [(run.arm, run.seed) for run in runs]


def test_the_budget_ends_a_search_which_then_goes_on_with_the_best_so_far(tmp_path):
    train, records = Invented(), Records()
    study(records, plans(budget=4), train)
    for name in "ab":
        searched = [run for run in train.runs if (run.arm, run.seed) == (name, 0)]
        assert len(searched) == 4
    row = tables.row_of(plans(budget=4)[1], records)
    assert tables.search_text(row) == "4 of at most 4, not settled"
    assert row.searched[row.best] == min(row.searched.values())
    assert len(row.losses) == 3
    larger = tables.row_of(plans(budget=100)[1], records)
    assert larger.best == row.best  # a budget can grow: what was searched counts


def test_a_line_that_was_cut_off_is_trained_again(tmp_path):
    path, train = tmp_path / "runs.jsonl", Invented()
    study(Records(path), plans(), train)
    count = len(train.runs)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    study(Records(path), plans(), train)
    assert len(train.runs) == count + 1
    assert [json.dumps(line) for line in read(path)] == lines
    assert len(path.read_text().splitlines()) == count + 1  # what was cut off stays, alone


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_study_that_is_killed_goes_on_where_it_was(tmp_path, jobs):
    """Its processes end with it. The control of what is kept: another text is another study."""
    script = tmp_path / "study_of_sleepers.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path[:0] = [{str(RECIPES)!r}]
        from pathlib import Path
        from study.harness import Arm, Plan, study
        from study.records import Records
        def train(run):
            time.sleep(0.05)
            return {{"loss": 1.0, "seconds": 0.0}}
        if __name__ == "__main__":
            path, text, jobs = sys.argv[1:]
            plan = Plan("one", Arm({{}}, {{"rate": 1.0}}, {{}}), {{"text": text}}, range(1, 41))
            study(Records(Path(path)), [plan], train, int(jobs))
        """)
    )
    path = tmp_path / "runs.jsonl"
    words = [sys.executable, str(script), str(path)]
    process = subprocess.Popen([*words, "a", jobs], stdout=subprocess.PIPE)
    while not path.is_file() or path.read_text().count("\n") < 3:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=20)  # until nobody holds the pipe: no worker is left
    before = path.read_text()
    assert 3 <= before.count("\n") < 40
    subprocess.run([*words, "a", jobs], check=True, stdout=subprocess.DEVNULL)
    assert path.read_text().startswith(before)
    assert sorted(line["seed"] for line in read(path)) == list(range(1, 41))
    subprocess.run([*words, "b", jobs], check=True, stdout=subprocess.DEVNULL)
    assert len([*read(path)]) == 80


def test_a_number_that_json_does_not_have_is_not_written(tmp_path):
    path = tmp_path / "runs.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        append(path, {"loss": math.inf})
    assert path.read_bytes() == b""


def test_runs_are_told_apart_by_everything_that_they_are_made_of():
    run = Run("a", CELL, {"betas": (0.9, 0.98)}, {"rate": 1.0}, 0)
    same = Run("a", {**CELL}, {"betas": [0.9, 0.98]}, {"rate": 1.0}, 0)
    assert run.key == same.key
    others = [
        Run("b", CELL, run.settings, run.point, 0),
        Run("a", {"steps": 9}, run.settings, run.point, 0),
        Run("a", CELL, {}, run.point, 0),
        Run("a", CELL, run.settings, {"rate": 2.0}, 0),
        Run("a", CELL, run.settings, run.point, 1),
    ]
    assert len({one.key for one in (run, *others)}) == 6


# --- what the seeds say ---------------------------------------------------------------------------


def test_differences_are_paired_by_seed():
    noise = {1: 0.5, 2: -0.3, 3: 0.1, 4: 0.9}
    base = {seed: 2 + value for seed, value in noise.items()}
    better = {seed: loss - 0.01 - 0.001 * seed for seed, loss in base.items()}
    found = paired.difference(better, base)
    assert found.mean == pytest.approx(-0.0125)
    # Deviation of 1, 2, 3, 4 thousandths over √4; the seeds' own, 0.5, is not in it.
    assert found.error == pytest.approx(0.00129099 / 2, rel=1e-4)
    assert paired.verdict(found) == "better"
    shuffled = dict(zip(base, [*base.values()][::-1], strict=True))
    assert paired.verdict(paired.difference(better, shuffled)) == "not told apart"
    assert paired.difference({1: 2.0}, {2: 2.0}) is None
    assert paired.difference({1: math.inf, 2: 2.0}, {1: 2.0, 2: 2.0}) is None


def test_verdicts_need_two_errors_and_three_pairs():
    says = [paired.verdict(paired.Estimate(d, 0.01, 3)) for d in (-0.03, 0.03, 0.02, -0.02)]
    assert says == ["better", "worse", "not told apart", "not told apart"]
    assert paired.verdict(paired.Estimate(-1.0, 0.01, 2)) == "fewer than 3 pairs"


def test_a_target_is_reached_beyond_three_errors():
    losses = {1: 1.80, 2: 1.82, 3: 1.81, 4: 1.83}  # 1.815, deviation 0.0129
    certainty = paired.certainty(losses, 1.84)
    assert certainty == pytest.approx((1.84 - 1.815) * math.sqrt(4) / 0.0129099, rel=1e-4)
    assert tables.target_text(losses, 1.84) == "yes, +3.9 errors"
    assert tables.target_text(losses, 1.834) == "no, +2.9 errors"
    assert tables.target_text({1: 1.0, 2: 1.0}, 1.8) == "fewer than 3 seeds"
    assert paired.certainty({1: 1.8, 2: 1.7, 3: math.inf}, 1.9) is None


# --- tables and figures ---------------------------------------------------------------------------


def test_a_report_has_a_row_for_each_arm_and_a_figure(tmp_path, capsys):
    records, train = Records(tmp_path / "runs.jsonl"), Invented()
    study(records, plans(), train)
    _, _, reporting = command.parsers("", ["fixed", "a", "b"], 100)
    out = ["--out", str(records.path), "--figure", str(tmp_path / "images" / "f.png")]
    arguments = reporting.parse_args(out)
    text = command.report(arguments, lambda cell: plans(), "b", target=1.0)
    heading, _, head, _, fixed, first, second = text.splitlines()
    assert heading.startswith(f"**steps 8**; {len(train.runs)} trainings, 0.01 process-hours")
    assert head.count("|") == fixed.count("|") == second.count("|")
    assert "| against b |" in head
    assert fixed.startswith(
        "| fixed | rate 1, other 1, beta 0.9 | – | 7.6700 ± 0.0100 (3) | 0.0058"
    )
    assert "| rate 4, other 8, beta 0.95 | " in first
    assert "| 0.0400 ± 0.0200 (3) | 0.0115 |" in first
    assert "| yes, +83.1 errors | +0.0200 ± 0.0058 | worse | 1.0 |" in first
    assert "| – |  | 1.0 |" in second
    assert (tmp_path / "images" / "f.png").read_bytes().startswith(b"\x89PNG")


def test_cells_are_sorted_by_size_and_told_apart():
    given = [("a", 128), ("b", 64), ("a", 64), ("a", 128)]
    lines = [{"cell": {"width": width, "corpus": corpus}} for corpus, width in given]
    found = [(cell["corpus"], cell["width"]) for cell in tables.cells_of(lines)]
    assert found == [("a", 64), ("a", 128), ("b", 64)]


def test_an_empty_study_says_so(tmp_path):
    _, _, reporting = command.parsers("", ["a"], 1)
    arguments = reporting.parse_args(["--out", str(tmp_path / "none.jsonl")])
    assert command.report(arguments, lambda cell: [], "a") == "No training has finished."


def test_runs_that_diverged_are_counted_and_drawn_as_such(tmp_path):
    records = Records()
    arms = [Plan(name, Arm({}, {"rate": 1.0}, {}), CELL, (1, 2)) for name in ("a", "b")]
    losses = iter([1.0, None, 2.0, None])
    study(records, arms, lambda run: {"loss": next(losses), "seconds": 1.0})
    found = tables.rows(records, arms)
    assert tables.loss_text(found[0].losses) == "1 of 2 diverge"
    assert [tables.verdict_text(row, found[0]) for row in found] == ["", "no pairs"]
    assert figures.label(found[0]) == "a (2 seeds, 1 diverged)"
    figures.draw(found, "a", tmp_path / "f.png", "")


def test_seeds_of_the_search_are_not_fresh():
    parser, *_ = command.parsers("", ["a"], 1)
    arguments = parser.parse_args(["run", "--out", "x", "--seeds", "0", "1"])
    with pytest.raises(SystemExit, match="the search has seen seed 0"):
        command.check_seeds(arguments)


def test_the_mean_over_search_seeds_counts():
    records = Records()
    plan = Plan("a", Arm({}, {"rate": 1.0}, {"rate": 2.0}), CELL, (5,), search_seeds=(0, 1))
    noisy = {0: lambda x: abs(x - 1), 1: lambda x: abs(x - 3)}
    study(records, [plan], lambda run: {
        "loss": noisy[run.seed](math.log2(run.point["rate"])) if run.seed < 2 else 0.0,
        "seconds": 0.0,
    })  # fmt: skip
    tried = plan.tried(records)
    assert tried == {(0.5,): 3, (1.0,): 2, (2.0,): 1, (4.0,): 1}
    assert plan.best(records) == (2.0,)  # the first of equal ones
