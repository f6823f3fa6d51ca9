"""A sharded step equals the step of one process, bit by bit, for given gradients."""

import pytest
import torch

from tests.distributed import layouts
from tests.distributed.launch import launch

FULL = pytest.mark.full
LAUNCHES = [
    ("ddp", 2),
    ("fsdp", 2),
    pytest.param(("ddp", 3), marks=FULL),
    pytest.param(("fsdp", 3), marks=FULL),
    pytest.param(("fsdp", 4), marks=FULL),
    pytest.param(("hsdp", 4), marks=FULL),
    ("tp", 4),
]


@pytest.fixture(scope="module")
def alone():
    """What one process trains, by (kind of model, case)."""
    results = {}
    for model_kind in ("none", "none tp"):
        for case, settings in layouts.CASES.items():
            model, _ = layouts.train(model_kind, **settings)
            results[model_kind, case] = layouts.full_weights(model)
    return results


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda param: f"{param[0]}{param[1]}")
def trained(request, tmp_path_factory):
    kind, processes = request.param
    out = tmp_path_factory.mktemp("layouts") / "results.pt"
    launch("layouts", processes, kind, out)
    return kind, processes, torch.load(out)


@pytest.mark.parametrize("case", layouts.CASES)
def test_equals_one_process(trained, alone, case):
    kind, _, results = trained
    expected = alone["none tp" if kind == "tp" else "none", case]
    assert results[case]["same on all ranks"]
    assert results[case]["dtensor"] is (kind != "ddp")
    for name, weight in results[case]["weights"].items():
        if case == "matched rms":
            # The norm of a sharded matrix is summed in another order: float64 sums, then one
            # float32 rounding of the factor.
            assert torch.allclose(weight, expected[name], rtol=0, atol=1e-6), name
        else:
            assert torch.equal(weight, expected[name]), name


def test_the_comparison_can_fail(alone):
    weights = alone["none", "pre_polar"]
    assert any(
        not torch.equal(weights[name], other)
        for name, other in alone["none", "plain momentum"].items()
    )
