"""Training goes on from DeepSpeed's checkpoints as if it had not stopped, also on more ranks."""

import pytest
import torch

from tests.distributed import zero_checkpoint
from tests.distributed.launch import launch
from tests.distributed.zero_checkpoint import MATRICES, ROUTED_OTHERWISE, SHAPES, UNKNOWN_TO_ADAM

FULL = pytest.mark.full
# AdamW's fused kernel may round elements that do not fill a vector register otherwise, and on
# another number of ranks partitions end elsewhere; twice within these steps, of entries below one.
ROUNDING = 2.5e-7


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of checkpoints with what was trained from them, each made once."""
    made = {}

    def save(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            launch("zero_checkpoint", 2, task, folder, folder / "results.pt", timeout=280)
            made[task] = folder, torch.load(folder / "results.pt")
        return made[task]

    return save


@pytest.fixture(params=["some", pytest.param("all", marks=FULL)])
def results(request, saved):
    return saved(request.param)[1]


def far(weights, expected, names):
    return max((weights[name] - expected[name]).abs().max().item() for name in names)


def test_resume_is_bitwise(results):
    for case, result in results.items():
        assert far(result["resumed"], result["uninterrupted"], SHAPES) == 0, case


def test_resume_from_a_universal_checkpoint_is_bitwise(results):
    # Its loader for stage 3 gives every group the first one's settings, and all one step count.
    for case, result in results.items():
        if case[1] not in UNKNOWN_TO_ADAM:
            assert far(result["universal"], result["uninterrupted"], SHAPES) == 0, case


def test_a_universal_checkpoint_that_lost_state_is_refused(results):
    refused = {
        case: one["universal"] for case, one in results.items() if case[1] in UNKNOWN_TO_ADAM
    }
    assert {case[1] for case in refused} == set(UNKNOWN_TO_ADAM)
    for case, messages in refused.items():
        assert len(messages) == 2
        for message in messages:
            assert "DeepSpeed's universal checkpoints hold exp_avg and" in message, (case, message)


@pytest.mark.full
def test_a_universal_checkpoint_goes_on_on_another_number_of_ranks(saved, tmp_path):
    folder, expected = saved("all")
    launch("zero_checkpoint", 3, "load", folder, tmp_path / "results.pt", timeout=280)
    loaded = torch.load(tmp_path / "results.pt")
    assert loaded.keys() == {case for case in zero_checkpoint.ALL if case[1] not in UNKNOWN_TO_ADAM}
    for case, result in loaded.items():
        weights = result["universal"]
        assert far(weights, expected[case]["uninterrupted"], MATRICES) == 0, case
        assert far(weights, expected[case]["uninterrupted"], SHAPES) <= ROUNDING, case


def test_the_state_matters(results):
    for (_, order), result in results.items():
        fresh, expected = result["weights only"], result["uninterrupted"]
        # A schedule that starts afresh and a momentum that does, or the schedule alone.
        assert far(fresh, expected, MATRICES) > 1e-3, order
        assert far(fresh, expected, ["embedding"]) > 1e-3


def test_other_routes_are_refused_by_name_on_every_rank(results):
    for case in ROUTED_OTHERWISE:
        for (checkpoint, routes), messages in results[case]["refused"].items():
            if checkpoint == "own" and routes == "fewer" and case[0] < 3:
                continue  # below
            assert len(messages) == 2
            for message in messages:
                assert message.startswith("ValueError: The checkpoint's routing differs: ")
                assert "down: Muon (1 matrix) there, AdamW here" in message
                assert ("embedding: " in message) == (routes == "exchanged")


def test_stages_1_and_2_refuse_groups_of_another_size_themselves(results):
    # DeepSpeed (0.19) does before it asks the optimizer.
    for case in ROUTED_OTHERWISE:
        if case[0] < 3:
            for message in results[case]["refused"]["own", "fewer"]:
                assert "layout does not match" in message
