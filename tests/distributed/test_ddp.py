"""Two processes under DDP and the stock Trainer train the weights that one process trains."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.integration.tiny import largest_difference, tiny_llama


def run(folder, processes, batch):
    """What each rank saved."""
    launch("train_ddp", processes, folder, batch)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {count: tmp_path_factory.mktemp(f"processes{count}") for count in (1, 2)}


@pytest.fixture(scope="module")
def two_ranks(folders):
    return run(folders[2], 2, batch=2)


@pytest.fixture(scope="module")
def alone(folders):
    (rank,) = run(folders[1], 1, batch=4)
    return rank


def test_the_ranks_hold_the_same_weights(two_ranks):
    assert [rank["world_size"] for rank in two_ranks] == [2, 2]
    assert largest_difference(two_ranks[0]["weights"], two_ranks[1]["weights"]) == 0


def test_two_processes_equal_one(two_ranks, alone):
    assert alone["world_size"] == 1
    # DDP averages two gradients where one process sums one batch: float32 rounding, which the
    # polar factor magnifies in directions of small singular values.
    assert largest_difference(two_ranks[0]["weights"], alone["weights"]) < 1e-4
    start = {name: p.detach() for name, p in tiny_llama().named_parameters()}
    assert largest_difference(start, alone["weights"]) > 1e-2


def test_resume_is_bitwise(two_ranks, alone):
    for rank in (*two_ranks, alone):
        assert largest_difference(rank["weights"], rank["resumed"]) == 0


def test_the_checkpoint_holds_all_momentum(two_ranks, alone, folders):
    # The Trainer saves the optimizer of rank 0 alone, so momentum must be whole there.
    states = [
        torch.load(folders[count] / "out" / "checkpoint-4" / "optimizer.pt", weights_only=True)
        for count in (2, 1)
    ]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        expected = states[1]["state"][index]["exp_avg"]
        assert expected.abs().max() > 0
        assert torch.allclose(state["exp_avg"], expected, rtol=1e-3, atol=1e-6)  # as the weights
