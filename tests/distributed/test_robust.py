"""One of four ranks sends −10 times its gradient: the robust aggregate is that of the honest."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hf_muon.distributed.robust import METHODS
from tests.distributed.launch import ON_CPU, ON_LOOPBACK, ROOT, launch

pytestmark = pytest.mark.full
RANKS = 4
REGRESSIONS = ("clean", "clean median", "median", "trimmed_mean", "multi_krum", "mean")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust")
    launch("robust", RANKS, "ddp", folder, timeout=290)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def stacked(ranks, case):
    """What each rank handed to DDP, by parameter."""
    names = ranks[0][case]["local"]
    return {name: torch.stack([rank[case]["local"][name] for rank in ranks]) for name in names}


def middle(values):
    """The two in the middle of four, in float64: what two methods keep of four ranks."""
    return values.double().sort(0).values[1:3].mean(0)


def kept(values, method):
    """What a method keeps of four ranks, the last of which is bad, in float64."""
    return values[:-1].double().mean(0) if method == "multi_krum" else middle(values)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in METHODS
        for name in ("clean", "attacked", "accumulated", "bfloat16")
        if (method, name) != ("multi_krum", "clean")  # below: it chooses for each bucket
    ],
)
def test_gradients_are_the_aggregate_of_what_the_ranks_have(ranks, method, name):
    found = ranks[0][method, name]["found"]
    given = stacked(ranks, (method, name))
    assert found.keys() == given.keys()
    assert "2.bias" not in found  # frozen
    for key, values in given.items():
        eps = torch.finfo(values.dtype).eps
        expected = kept(values, method)
        torch.testing.assert_close(found[key].double(), expected, rtol=2 * eps, atol=eps * 0.1)


def test_multi_krum_keeps_three_honest_ranks_of_four(ranks):
    given = stacked(ranks, ("multi_krum", "clean"))
    for key, found in ranks[0]["multi_krum", "clean"]["found"].items():
        others = (given[key].double().sum(0) - given[key].double()) / (RANKS - 1)
        assert min((found - other).abs().max() for other in others) < 1e-7, key


@pytest.mark.parametrize("case", ["clean", "attacked", "accumulated", "NaN"])
@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_have_the_same_bits(ranks, method, case):
    first = ranks[0][method, case]["found"]
    for other in ranks[1:]:
        assert all(torch.equal(first[key], other[method, case]["found"][key]) for key in first)


@pytest.mark.parametrize("method", METHODS)
def test_an_attack_cannot_move_it_beyond_the_honest_ranks_and_moves_the_mean(ranks, method):
    for key, values in stacked(ranks, (method, "attacked")).items():
        low, high = values[:-1].min(0).values, values[:-1].max(0).values
        found = ranks[0][method, "attacked"]["found"][key]
        assert (found >= low).all()
        assert (found <= high).all()
        honest = values[:-1].mean(0)
        plain = ranks[0]["mean", "attacked"]["found"][key]
        assert torch.cosine_similarity(found.flatten(), honest.flatten(), dim=0) > 0.8
        assert torch.cosine_similarity(plain.flatten(), honest.flatten(), dim=0) < 0
        # What the mean of three honest ranks and −10 times another one is, up to their noise.
        assert (plain - honest).norm() > 2 * honest.norm()


@pytest.mark.parametrize("method", METHODS)
def test_nan_of_one_rank_counts_as_an_extreme_and_is_seen(ranks, method):
    for key, values in stacked(ranks, (method, "NaN")).items():
        expected = kept(values.nan_to_num(torch.inf), method)
        torch.testing.assert_close(ranks[0][method, "NaN"]["found"][key].double(), expected)
    for rank in ranks:
        assert rank[method, "NaN"]["not_finite"] == [False, False, False, True]
        assert rank[method, "attacked"]["not_finite"] == [False] * RANKS
    plain = ranks[0]["mean", "NaN"]["found"]
    assert all(gradient.isnan().all() for gradient in plain.values())


@pytest.mark.parametrize("case", ["llama", "lora"])
def test_a_trainer_steps_with_the_aggregate_of_accumulated_gradients(ranks, case):
    given, found = stacked(ranks, case), ranks[0][case]["found"]
    assert found.keys() == given.keys()
    assert len(found) > 14
    for key, values in given.items():
        torch.testing.assert_close(found[key].double(), middle(values), rtol=1e-6, atol=1e-9)
    for other in ranks[1:]:
        weights = other[case]["weights"]
        assert all(torch.equal(weights[k], w) for k, w in ranks[0][case]["weights"].items())


def test_what_cannot_work_is_refused_on_every_rank(ranks):
    for rank in ranks:
        assert "trim=2 leaves none of 4 ranks" in rank["trim"]
        assert "has a communication hook already" in rank["hook"]
        assert rank["again"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fsdp", "this is FSDP"),
        ("zero2", "this is DeepSpeed"),
    ],
)
def test_sharded_gradients_are_refused_with_the_reason(tmp_path, kind, message):
    launch("robust", 2, kind, tmp_path)
    for rank in range(2):
        assert message in torch.load(tmp_path / f"rank{rank}.pt")["refused"]


def test_training_under_attack_ends_where_the_clean_one_does_and_the_mean_does_not(ranks):
    losses = {name: torch.tensor(ranks[0]["regression", name]) for name in REGRESSIONS}
    clean = losses["clean"]
    for name in ("clean median", "median", "trimmed_mean", "multi_krum"):
        assert abs(losses[name].mean() - clean.mean()) < 2 * clean.std(), (name, losses)
    assert losses["mean"].min() > 100 * clean.max()


def test_the_study_runs_and_its_attack_spoils_the_mean(tmp_path):
    file = tmp_path / "robust.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS)]
    command += [*ON_LOOPBACK, "scripts/bench/robust.py", "--steps", "20", "--seeds", "2"]
    command += ["--batch", "4", "--repeats", "2", "--json", str(file)]
    environment = {**os.environ, **ON_CPU, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=280)
    losses = json.loads(file.read_text())["losses"]
    clean, attacked = max(losses["mean, clean"]), min(losses["mean, attacked"])
    assert attacked > clean + 1
    assert max(losses["median, attacked"]) < clean + 0.5
