"""A step under DeepSpeed ZeRO equals the step of one process, bit by bit, for given gradients."""

import pytest
import torch

from tests.distributed import layouts, zero
from tests.distributed.launch import launch
from tests.distributed.test_layouts import ROUNDING
from tests.integration.tiny import largest_difference


@pytest.fixture(scope="module")
def alone():
    return {
        case: layouts.full_weights(layouts.train("none", **settings)[0])
        for case, settings in layouts.CASES.items()
    }


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.full)], ids="{} ranks".format
)
def results(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero") / "results.pt"
    launch("zero", request.param, out, timeout=280)
    return torch.load(out)


@pytest.mark.parametrize("case", layouts.CASES)
@pytest.mark.parametrize("stage", zero.STAGES)
def test_equals_one_process(results, alone, stage, case):
    for name, weight in results[stage, case]["weights"].items():
        if name in layouts.VECTORS or case in layouts.TO_ROUNDING:
            # AdamW's fused kernel rounds elements that do not fill a vector register otherwise,
            # and partitions end elsewhere.
            assert torch.allclose(weight, alone[case][name], rtol=0, atol=ROUNDING), name
        else:
            assert torch.equal(weight, alone[case][name]), name


@pytest.mark.parametrize("stage", zero.STAGES)
def test_each_matrix_is_computed_once_and_by_all_ranks(results, stage):
    model = layouts.Model()
    matrices = sum(
        len(layouts.MATRICES.get(name) or layouts.whole(p.shape))
        for name, p in model.named_parameters()
        if name not in layouts.VECTORS
    )
    computed = results[stage, layouts.DEFAULT]["computed"]
    assert sum(computed) == matrices * layouts.STEPS
    assert min(computed) > 0


def test_a_wrong_region_would_be_noticed(results, alone):
    weights = results[3, "wrong region"]["weights"]
    difference = (weights["up"] - alone[layouts.DEFAULT]["up"]).abs().max()
    assert difference > 1000 * ROUNDING


@pytest.mark.parametrize("stage", zero.STAGES)
def test_a_bad_gradient_on_one_rank_stops_all_and_changes_nothing(results, stage):
    result = results["not finite"][stage]
    *others, mine = result["messages"]
    assert "NaN or infinity in " in mine
    assert all("Another rank has a gradient" in message for message in others)
    assert largest_difference(result["before"], result["after"]) == 0


def test_a_wrong_map_is_refused_on_all_ranks(results):
    assert all("Remove 'round_robin_gradients'" in message for message in results["round robin"])
