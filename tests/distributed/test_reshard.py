"""A checkpoint goes on under another number of processes and another sharding, bit by bit."""

import pytest
import torch

from tests.distributed import layouts, reshard
from tests.distributed.launch import launch
from tests.distributed.test_layouts import ROUNDING

FULL = pytest.mark.full
# Norms of whole matrices enter, as in layouts.TO_ROUNDING.
TO_ROUNDING = {"int8", "auto, hyperball"}
MOVES = [
    (("fsdp", 2), ("fsdp", 1)),
    pytest.param(("fsdp", 2), ("fsdp", 3), marks=FULL),
    pytest.param(("fsdp", 2), ("fsdp", 4), marks=FULL),
    pytest.param(("fsdp", 2), ("ddp", 2), marks=FULL),
    pytest.param(("fsdp", 2), ("hsdp", 4), marks=FULL),
    pytest.param(("ddp", 2), ("fsdp", 3), marks=FULL),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of checkpoints, each made once."""
    folders = {}

    def save(kind, processes):
        if (kind, processes) not in folders:
            folder = tmp_path_factory.mktemp(f"{kind}{processes}")
            launch("reshard", processes, "save", kind, folder)
            folders[kind, processes] = folder
        return folders[kind, processes]

    return save


@pytest.mark.parametrize(("source", "target"), MOVES, ids=str)
def test_training_goes_on_as_if_it_had_not_stopped(saved, tmp_path, source, target):
    out = tmp_path / "results.pt"
    launch("reshard", target[1], "load", target[0], saved(*source), out)
    check_against_one_process(torch.load(out))


def test_whole_state_is_saved_and_loaded(tmp_path):
    out = tmp_path / "results.pt"
    launch("reshard", 2, "full", "fsdp", out)
    check_against_one_process(torch.load(out))


def check_against_one_process(results):
    for case in reshard.CASES:
        model, optimizer = reshard.build("none", case)
        reshard.train(model, optimizer, range(4))
        for name, weight in layouts.full_weights(model).items():
            if case in TO_ROUNDING:
                assert torch.allclose(results[case][name], weight, rtol=0, atol=ROUNDING), name
            else:
                assert torch.equal(results[case][name], weight), (case, name)


def test_the_momentum_matters():
    model, optimizer = reshard.build("none", "pre_polar")
    reshard.train(model, optimizer, range(2))
    fresh, other = reshard.build("none", "pre_polar")
    fresh.load_state_dict(model.state_dict())
    reshard.train(model, optimizer, range(2, 4))
    reshard.train(fresh, other, range(2, 4))
    assert not torch.equal(model.q, fresh.q)
