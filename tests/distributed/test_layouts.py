"""A sharded step equals the step of one process, bit by bit, for given gradients."""

import pytest
import torch

from hf_muon.rules import register_map
from tests.distributed import layouts
from tests.distributed.launch import launch

FULL = pytest.mark.full
LAUNCHES = [
    ("ddp", 2),
    ("fsdp", 2),
    pytest.param(("ddp", 3), marks=FULL),
    pytest.param(("fsdp", 3), marks=FULL),
    pytest.param(("fsdp", 4), marks=FULL),
    pytest.param(("hsdp", 4), marks=FULL),
    ("tp", 4),
]
# A few float32 roundings of entries of size one.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def alone():
    """What one process trains, by (kind of model, case)."""
    results = {}
    for model_kind in ("none", "none tp"):
        for case, settings in layouts.CASES.items():
            model, _ = layouts.train(model_kind, **settings)
            results[model_kind, case] = layouts.full_weights(model)
    return results


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda param: f"{param[0]}{param[1]}")
def trained(request, tmp_path_factory):
    kind, processes = request.param
    out = tmp_path_factory.mktemp("layouts") / "results.pt"
    launch("layouts", processes, kind, out)
    return kind, processes, torch.load(out)


@pytest.mark.parametrize("case", layouts.CASES)
def test_equals_one_process(trained, alone, case):
    kind, _, results = trained
    expected = alone["none tp" if kind == "tp" else "none", case]
    assert results[case]["same on all ranks"]
    assert results[case]["dtensor"] is (kind != "ddp")
    for name, weight in results[case]["weights"].items():
        if case in layouts.TO_ROUNDING:
            assert torch.allclose(weight, expected[name], rtol=0, atol=ROUNDING), name
        else:
            assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("case", layouts.IN_FLOAT16)
def test_results_may_travel_back_in_float16(trained, case):
    kind, _, results = trained
    settings = layouts.IN_FLOAT16[case]
    model, _ = layouts.train("none tp" if kind == "tp" else "none", 2.0**20, **settings)
    expected = layouts.full_weights(model)
    assert results[case]["same on all ranks"] or case == "rounded"
    equal = [torch.equal(w, expected[name]) for name, w in results[case]["weights"].items()]
    # What does not fit is seen to be rounded, wherever its owner is another rank.
    assert all(equal) if case == "fits" else not all(equal)


def test_fewer_bytes_travel_back_in_float16(trained):
    _, _, results = trained
    there, back = (results[case]["sent by all"] for case in ("owner", "fits"))
    # All ranks together send as much to owners as owners send back.
    assert back == (there[0] * 3 / 4, there[1] / 2)
    assert sum(back) > 0


# kind -> which of (all-to-all, all-gather) the exchange launches.
COLLECTIVES = {
    "ddp": (False, True),
    "fsdp": (True, False),
    "hsdp": (True, True),
    "tp": (True, False),
}


def test_only_the_collectives_that_the_layout_needs(trained):
    kind, _, results = trained
    counts = results["owner"]["counts"]
    launched = [counts.get(f"{name}_single", 0) for name in ("all_to_all", "all_gather")]
    assert tuple(number > 0 for number in launched) == COLLECTIVES[kind]
    # There and back for every bucket of every step.
    assert launched[0] % (2 * layouts.STEPS) == 0


def test_redundant_work_needs_no_messages(trained):
    kind, _, results = trained
    if kind == "ddp":
        assert results["redundant"]["counts"] == {}
    assert "all_gather_single" not in results["redundant"]["counts"]


def test_the_comparison_can_fail(alone):
    weights, others = alone["none", layouts.DEFAULT], alone["none", layouts.OTHER]
    assert not any(torch.equal(weights[name], others[name]) for name in layouts.SHAPES)


def test_polar_factors_of_shards_would_be_noticed(alone, monkeypatch):
    rows, cols = layouts.SHAPES["up"]
    shards = tuple((i * rows // 2 * cols, (rows // 2, cols), (cols, 1), 0) for i in range(2))
    monkeypatch.setitem(layouts.MATRICES, "up", shards)
    model, _ = layouts.train("none", **layouts.CASES[layouts.DEFAULT])
    difference = (model.up - alone["none", layouts.DEFAULT]["up"]).abs().max()
    assert difference > 1000 * ROUNDING
    assert torch.equal(model.q, alone["none", layouts.DEFAULT]["q"])


@pytest.mark.parametrize("settings", [{"rescale": "rows"}, {"momentum_dtype": "int8"}], ids=str)
def test_row_means_and_blocks_of_shards_would_be_noticed(settings, monkeypatch):
    register_map("as_it_is", lambda X, polar, settings: X.clone())
    columns = layouts.SHAPES["up"][1]
    settings = {**settings, "matrix_map": "as_it_is", "adjust_lr": "none", "lr": 1.0}
    whole, _ = layouts.train("none", **settings)
    halves = tuple((i * columns // 2, (130, columns // 2), (columns, 1), 0) for i in range(2))
    monkeypatch.setitem(layouts.MATRICES, "up", halves)
    shards, _ = layouts.train("none", **settings)
    assert (whole.up - shards.up).abs().max() > 100 * ROUNDING
    assert torch.equal(whole.q, shards.q)
