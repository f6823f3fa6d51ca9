"""QK-clip scales the same weights under every launcher, wherever they are."""

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.qk_clip import MODELS, STEPS
from tests.integration.test_qk_clip import TAU
from tests.integration.tiny import largest_difference

pytestmark = pytest.mark.full
KINDS = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3-small"]
CASES = [(model, optim) for model in MODELS for optim in ("muon", "adamw_torch")]


def launched(folder, processes, *kinds):
    launch("qk_clip", processes, folder, 4 // processes, *kinds, timeout=280)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (only,) = launched(tmp_path_factory.mktemp("alone"), 1, "ddp", "none")
    return only


@pytest.fixture(scope="module", params=KINDS)
def kind_and_ranks(request, tmp_path_factory):
    return request.param, launched(tmp_path_factory.mktemp(request.param), 2, request.param)


@pytest.mark.parametrize(("model", "optim"), CASES)
def test_weights_equal_those_of_one_process(kind_and_ranks, alone, model, optim):
    kind, ranks = kind_and_ranks
    expected = alone["ddp", model, optim]
    free = alone["none", model, optim]["weights"]
    for rank in ranks:
        found = rank[kind, model, optim]
        # Gradients are averaged where one process sums a batch, and three steps pass roundings on.
        assert largest_difference(found["weights"], expected["weights"]) < 2e-6
        assert found["logged"] == pytest.approx(expected["logged"], rel=1e-3)
        assert len(found["logged"]) == STEPS
        assert found["logged"][0] > 5 * TAU
        assert found["logged"][-1] < 1.5 * TAU
        if kind.startswith("zero"):  # DeepSpeed trains copies
            assert largest_difference(found["masters"], found["weights"]) == 0
    assert largest_difference(expected["weights"], free) > 0.1


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    kinds = ["zero2-bf16"]
    return launched(tmp_path_factory.mktemp("narrow"), 2, *kinds)


@pytest.mark.parametrize(("model", "optim"), CASES)
def test_in_bfloat16_both_copies_change(narrow, model, optim):
    for rank in narrow:
        found = rank["zero2-bf16", model, optim]
        weights, masters = found["weights"], found["masters"]
        assert (
            largest_difference(weights, {n: m.bfloat16().float() for n, m in masters.items()}) == 0
        )
        assert largest_difference(weights, masters) > 0
        assert found["logged"][-1] < 1.5 * TAU
