"""The LLaMA recipe: the search of rates, what it says, and the heat map."""

import json
import math
import sys
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
import yaml

from tests.integration.test_recipe_llama import (
    RECIPE,
    SMALL,
    RecipeError,
    compare,
    heat_map,
    launch,
    search,
)


def test_search_widens_a_grid_whose_best_rate_is_at_the_edge():
    beyond_edge = import_module("study.descent").beyond_edge
    assert beyond_edge({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}) == [8.0]
    assert beyond_edge({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}) == [0.5]
    assert beyond_edge({1.0: 2.0, 2.0: 1.0, 4.0: 3.0}) == []


def invented_training(started):
    """Write results of no training: Muon is best at 0.02 and 0.04, AdamW at 0.005 and 0.02."""
    best = {"muon": (0.02, 0.04), "adamw_torch_fused": (0.005, 0.02)}

    def run_quietly(run):
        started.append(run.options)
        rate = float(run.options["learning_rate"])
        rates = rate, float(run.options.get("other_learning_rate", rate))
        distance = [
            math.log2(r / b) ** 2 for r, b in zip(rates, best[run.options["optim"]], strict=True)
        ]
        loss = 2 + sum(distance) + 0.01 * int(run.options["seed"])
        curve = [{"step": n, "tokens": n, "loss": 5 - n * (5 - loss) / 4} for n in range(5)]
        facts = {"model": {"parameters": 10**6}, "data": {"corpus": "none"}, "tokens": 4}
        found = {"final_validation_loss": loss, "eval_curve": curve, "train_curve": curve}
        run.folder.mkdir(parents=True)
        (run.folder / "results.json").write_text(json.dumps(found | facts | {"wall_seconds": 1.0}))

    return run_quietly


def test_the_search_gives_either_optimizer_two_rates(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(search, "run_quietly", invented_training(started))
    monkeypatch.setattr(search, "HERE", tmp_path)
    (tmp_path / "configs").mkdir()
    rates = ["--muon", "0.01", "0.02", "--adamw", "0.01", "0.02", "--final-seeds", "3", "--record"]
    config = str(RECIPE / "configs" / "tiny.yaml")
    monkeypatch.setattr(sys, "argv", ["search.py", config, *rates, "--out", str(tmp_path / "out")])
    search.main()
    said = capsys.readouterr().out
    assert "| muon | 0.02 | 0.04 | **2.0000** |" in said
    assert "| adamw | 0.005 | 0.02 | **2.0000** |" in said
    assert said.count("2.0200 ± 0.0100 (3)") == 2
    assert "Tokens muon needs to reach adamw's final loss: 100.0% ± 0.0%" in said
    recorded = yaml.safe_load((tmp_path / "configs" / "best" / "tiny.yaml").read_text())
    assert recorded["adamw"]["learning_rate"] == 0.005
    assert recorded["adamw"]["other_learning_rate"] == 0.02
    assert {name for name in ("seeds.png", "comparison.png", "search.md", "search.jsonl")} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    count = len(started)
    (tmp_path / "out" / "search.jsonl").unlink()  # what is finished in its folder counts as well
    search.main()
    assert len(started) == count


def test_the_search_starts_from_the_rates_that_are_given(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["search.py", "tiny.yaml", "--muon", "0.1", "0.2", "--adamw", "0.01", "0.02"]
    )
    arguments = search.command_line()
    assert (arguments.muon, arguments.adamw) == ([0.1, 0.2], [0.01, 0.02])
    monkeypatch.setattr(sys, "argv", ["search.py", "tiny.yaml", "--muon", "0.1", "0.2"])
    with pytest.raises(SystemExit):  # four rates of AdamW against two
        search.command_line()


@pytest.mark.full
def test_heat_map_trains_at_every_point(tmp_path, monkeypatch):
    grid = ["--momenta", "0.9", "--rates", "0.01", "0.02", "--batches", "256"]
    settings = {name: value for name, value in SMALL.items() if name != "tokens_per_step"}
    small = chain.from_iterable((f"--{name}", str(value)) for name, value in settings.items())
    out = ["--out", str(tmp_path), "--", *small]
    monkeypatch.setattr(sys, "argv", ["heat_map.py", "configs/tiny.yaml", *grid, *out])
    heat_map.main()
    found = json.loads((tmp_path / "heat_map.json").read_text())["losses"]
    assert [point["rate"] for point in found] == [0.01, 0.02]
    for point in found:
        folder = tmp_path / f"batch256_momentum0.9_lr{point['rate']:g}"
        result = json.loads((folder / "results.json").read_text())
        assert point["loss"] == result["final_validation_loss"]
        assert "momentum=0.9" in result["training_arguments"]["optim_args"]
    assert (tmp_path / "heat_map.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_study_varies_cannot_be_fixed_for_all_its_runs():
    varied = {"tokens_per_step": "256"}
    for fixed in ("--tokens_per_step", "--tokens-per-step=512"):
        with pytest.raises(RecipeError, match="--tokens_per_step"):
            launch.Run(Path("out"), "configs/tiny.yaml", varied, ["--seed", "1", fixed, "512"])
    with pytest.raises(RecipeError, match="--output_dir"):
        launch.Run(Path("out"), "configs/tiny.yaml", varied, ["--output_dir", "elsewhere"])
    values = ["--token_budget", "512", "--run_name", "tokens_per_step"]
    assert launch.Run(Path("out"), "configs/tiny.yaml", varied, values)


def test_the_best_rate_of_each_batch_and_momentum_is_shown():
    def loss(batch, momentum, rate):
        return abs(rate - 0.02) + abs(momentum - 0.95) + batch / 1e4

    points = [
        heat_map.Point(batch, momentum, rate)
        for batch in (256, 512)
        for momentum in (0.9, 0.95)
        for rate in (0.01, 0.02)
    ]
    table = heat_map.best_table({point: loss(*point) for point in points})
    columns = [list(column.cells) for column in table.columns]
    assert columns[2] == ["0.02"] * 4
    assert columns[3] == ["0.076", "0.026", "0.101", "0.051"]


def test_tokens_to_reach_a_loss_are_interpolated():
    def run(losses):
        curve = [{"tokens": 100 * n, "loss": loss} for n, loss in enumerate(losses)]
        return {"eval_curve": curve, "tokens": curve[-1]["tokens"]}

    assert search.tokens_to_reach(run([4, 2, 1]), run([4, 3, 1.5])) == 0.75
    assert search.tokens_to_reach(run([4, 3, 2]), run([4, 3, 1.5])) is None


def test_comparing_without_recorded_rates_names_the_search():
    with pytest.raises(RecipeError, match=r"search\.py .* --record"):
        compare.best_options(Path("configs/never_searched.yaml"))
