"""Rules that a user registers train the same weights under DDP and FSDP2 as on one process."""

from unittest import mock

import pytest
import torch

from tests.distributed import extended, layouts
from tests.distributed.launch import launch

# The norm of a sharded matrix is summed in another order, in float64, and rounded once to float32.
TO_ROUNDING = {"norms"}


@pytest.fixture(scope="module")
def alone():
    extended.register()
    with mock.patch.object(layouts, "MATRICES", extended.without_interleaved()):
        return _alone()


def _alone():
    return {
        case: layouts.full_weights(layouts.train("none", **settings)[0])
        for case, settings in {**extended.ELEMENTWISE, **extended.WHOLE, "default": {}}.items()
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_equal_one_process(kind, alone, tmp_path):
    launch("extended", 2, kind, tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt")
    assert ("rows" in results) is (kind == "ddp")
    for case, result in results.items():
        assert result["same on all ranks"]
        for name, weight in result["weights"].items():
            if case in TO_ROUNDING:
                assert torch.allclose(weight, alone[case][name], rtol=0, atol=2e-6), (case, name)
            else:
                assert torch.equal(weight, alone[case][name]), (case, name)


def test_the_comparison_can_fail(alone):
    for case in {**extended.ELEMENTWISE, **extended.WHOLE}:
        same = torch.equal(alone[case]["up"], alone["default"]["up"])
        assert same is (case == "skipped")  # no gradient is zero there
