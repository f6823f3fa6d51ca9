"""The stock Trainer trains on two processes the weights that it trains in one."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.integration.tiny import largest_difference, tiny_llama

FULL = pytest.mark.full
MORE = ("fsdp-lora", "zero0", "zero1", "zero3", "zero3-init", "zero3-small", "zero2-offload")
LAUNCHES = [
    ("ddp", 2),
    ("fsdp", 2),
    ("zero2", 2),
    *(pytest.param((kind, 2), marks=FULL) for kind in (*MORE, "zero2-lora", "zero3-lora")),
]
PLACEMENTS = {"ddp": "whole", "fsdp": "sharded", "zero0": "whole"}  # others of zero: "flat"


class Runs:
    """Launches, each made once."""

    def __init__(self, make_folder):
        self.make_folder, self.folders, self.results = make_folder, {}, {}

    def __call__(self, kind, processes):
        """What each rank saved."""
        key = kind, processes
        if key not in self.results:
            self.folders[key] = folder = self.make_folder(f"{kind}{processes}")
            launch("train", processes, kind, folder, 4 // processes)
            ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]
            self.results[key] = ranks
        return self.results[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp)


@pytest.fixture(params=LAUNCHES, ids=lambda param: f"{param[0]}{param[1]}")
def kind_and_ranks(request, runs):
    kind, processes = request.param
    return kind, runs(kind, processes)


def alone(runs, kind):
    """One process; a model for one process is not sharded."""
    (rank,) = runs("ddp-lora" if kind.endswith("lora") else "ddp", 1)
    return rank


def test_the_launch_is_what_was_asked_for(kind_and_ranks):
    kind, ranks = kind_and_ranks
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert ranks[0]["placement"] == PLACEMENTS.get(kind.partition("-")[0], "flat")
    assert [rank["untrained"] for rank in ranks] == [[], []]  # and no warning that says otherwise


def test_the_ranks_hold_the_same_weights(kind_and_ranks):
    _, ranks = kind_and_ranks
    assert largest_difference(ranks[0]["weights"], ranks[1]["weights"]) == 0


def test_two_processes_equal_one(kind_and_ranks, runs):
    kind, ranks = kind_and_ranks
    expected = alone(runs, kind)
    assert expected["world_size"] == 1
    # DeepSpeed knows no norm where it does not wrap the optimizer; it clips all the same.
    norms = [] if kind == "zero0" else expected["grad_norm"]
    assert ranks[0]["grad_norm"] == pytest.approx(norms, rel=1e-5)
    # Two gradients are averaged where one process sums one batch: some float32 roundings of
    # weights around one.
    assert largest_difference(ranks[0]["weights"], expected["weights"]) < 2e-6


def test_the_weights_moved_and_gradients_were_clipped(runs):
    start = {name: p.detach() for name, p in tiny_llama().named_parameters()}
    assert largest_difference(start, alone(runs, "ddp")["weights"]) > 1e-2
    assert min(alone(runs, "ddp")["grad_norm"]) > 1


def test_resume_is_bitwise(kind_and_ranks):
    _, ranks = kind_and_ranks
    for rank in ranks:
        assert largest_difference(rank["weights"], rank["resumed"]) == 0


def test_a_ddp_checkpoint_holds_all_momentum(runs):
    # The Trainer saves the optimizer of rank 0 alone, so momentum must be whole there.
    states = []
    for count in (2, 1):
        runs("ddp", count)
        path = runs.folders["ddp", count] / "out" / "checkpoint-4" / "optimizer.pt"
        states.append(torch.load(path, weights_only=True))
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        expected = states[1]["state"][index]["exp_avg"]
        assert expected.abs().max() > 0
        assert torch.allclose(state["exp_avg"], expected, rtol=1e-3, atol=1e-6)  # as the weights
