"""The monitor says under every launcher what gradients recorded in one process say."""

import pytest
import torch

from hf_muon.diagnostics.history import read_spectra
from tests.distributed.launch import launch
from tests.distributed.monitor import EVERY, ORDERS, STEPS, WATCHED
from tests.integration.recorder import assert_close
from tests.integration.tiny import largest_difference
from tests.reference.monitor import sample as expected_of

pytestmark = pytest.mark.full
KINDS = ["ddp", "fsdp", "zero2", "zero3-small"]
PLACEMENTS = {"ddp": "whole", "fsdp": "sharded", "zero2": "flat", "zero3-small": "flat"}


class Launch:
    """What the ranks of a launch saved, and the samples of rank 0."""

    def __init__(self, folder, kind, processes):
        launch("monitor", processes, kind, folder, 4 // processes)
        self.ranks = [
            torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)
        ]
        self.samples = {order: read_spectra(folder / order) for order in ORDERS}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Launch(tmp_path_factory.mktemp("alone"), "ddp", 1)


@pytest.fixture(scope="module", params=KINDS)
def kind_and_launch(request, tmp_path_factory):
    return request.param, Launch(tmp_path_factory.mktemp(request.param), request.param, 2)


def test_the_launch_is_what_was_asked_for(kind_and_launch):
    kind, launched = kind_and_launch
    assert [rank["world_size"] for rank in launched.ranks] == [2, 2]
    assert launched.ranks[0]["placement"] == PLACEMENTS[kind]


@pytest.mark.parametrize("order", ORDERS)
def test_samples_equal_a_recomputation_in_one_process(kind_and_launch, alone, order):
    _, launched = kind_and_launch
    samples = launched.samples[order]
    steps = range(EVERY, STEPS + 1, EVERY)
    assert len(samples) == len(steps) * 5
    for sample in samples:
        history = alone.ranks[0][order]["histories"][sample["layer"]]
        step = sample["step"]
        before = step - EVERY if step > EVERY else None
        # Two gradients are averaged where one process sums one batch, and eight steps magnify the
        # roundings; values of the order of the tolerance times the largest are not compared.
        assert_close(sample, expected_of(history, step, 4, before=before), 2e-3)
        with pytest.raises(AssertionError):  # a step that is not the one asked for
            assert_close(sample, expected_of(history, step - 1, 4), 2e-3)


def test_the_run_is_bitwise_the_run_without_it(kind_and_launch):
    _, launched = kind_and_launch
    for rank in launched.ranks:
        assert largest_difference(rank["plain"], rank[ORDERS[0]]["weights"]) == 0
        assert largest_difference(rank["plain"], rank[ORDERS[1]]["weights"]) > 0


def test_only_the_first_rank_logs(kind_and_launch):
    _, launched = kind_and_launch
    first, second = (rank[ORDERS[0]]["logged"] for rank in launched.ranks)
    assert [record["step"] for record in first] == [4, 8]
    assert second == []


@pytest.mark.parametrize("order", ORDERS)
def test_inputs_are_the_mean_over_what_the_ranks_saw(kind_and_launch, order):
    _, launched = kind_and_launch
    samples = {s["step"]: s for s in launched.samples[order] if WATCHED in s["layer"]}
    assert set(samples) == {4, 8}
    for step, sample in samples.items():
        first, second = (rank[order]["inputs"][step] for rank in launched.ranks)
        assert first != second  # of different batches
        assert sample["input_stable_rank"] == pytest.approx((first + second) / 2, rel=1e-6)
