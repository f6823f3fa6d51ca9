"""bfloat16 under DeepSpeed trains, for equal data on each rank, exactly what one process does."""

import pytest
import torch

from tests.distributed import zero_bfloat16
from tests.distributed.launch import launch

pytestmark = pytest.mark.full
MATRICES = 14


@pytest.fixture(scope="module", params=["pre_polar", "post_polar,polar_only"])
def results(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("bfloat16") / "results.pt"
    launch("zero_bfloat16", 2, request.param, out, timeout=280)
    return torch.load(out)


@pytest.fixture(scope="module")
def alone(results):
    return {order: zero_bfloat16.alone(order) for order in {order for order, _ in results}}


def far(weights, expected):
    assert weights.keys() == expected.keys()
    return max((weights[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize("kind", zero_bfloat16.KINDS)
def test_equals_one_process(results, alone, kind):
    for order, expected in alone.items():
        # No tolerance: (g + g) / 2 is g, and no factor of clipping comes in between.
        assert far(results[order, kind]["weights"], expected) == 0, order


@pytest.mark.parametrize("kind", zero_bfloat16.KINDS)
def test_deepspeed_wraps_the_optimizer_as_expected(results, alone, kind):
    for order in alone:
        assert results[order, kind]["wrapper"] == zero_bfloat16.KINDS[kind][-1]


@pytest.mark.parametrize("kind", zero_bfloat16.KINDS)
def test_each_matrix_is_computed_once_a_step(results, alone, kind):
    for order in alone:
        assert results[order, kind]["computed"] == MATRICES * zero_bfloat16.STEPS


def test_the_step_when_stage_0_is_built_would_be_noticed(results, alone):
    # DeepSpeed (0.19) steps on zero gradients there, to have memory allocated.
    (order,) = (order for order, kind in results if kind == zero_bfloat16.STEPPED_WHEN_BUILT)
    control = results[order, zero_bfloat16.STEPPED_WHEN_BUILT]
    assert control["computed"] == MATRICES * (zero_bfloat16.STEPS + 1)
    assert far(control["weights"], alone[order]) > 1e-3
