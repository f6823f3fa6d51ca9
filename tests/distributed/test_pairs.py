"""A step on LoRA pairs under any sharding equals that of one process, for given gradients."""

import pytest
import torch

from tests.distributed import pairs
from tests.distributed.launch import launch

FULL = pytest.mark.full
LAUNCHES = [
    ("ddp", 2),
    ("fsdp", 2),
    ("zero", 2),
    pytest.param(("fsdp", 3), marks=FULL),
    pytest.param(("hsdp", 4), marks=FULL),
    pytest.param(("zero", 3), marks=FULL),
]


@pytest.fixture(scope="module")
def alone():
    """What one process trains, by case and by whether some gradients are missing."""
    return {
        (case, bool(skip)): pairs.train("none", skip, **settings)
        for case, settings in pairs.CASES.items()
        for skip in (pairs.WITHOUT_GRADIENT, ())
    }


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda param: f"{param[0]}{param[1]}")
def trained(request, tmp_path_factory):
    kind, processes = request.param
    out = tmp_path_factory.mktemp("pairs") / "results.pt"
    launch("pairs", processes, kind, out, timeout=280)
    return kind, torch.load(out)


@pytest.mark.parametrize("case", pairs.CASES)
def test_equals_one_process_bit_by_bit(trained, alone, case):
    kind, results = trained
    for run in [f"zero{stage}" for stage in pairs.STAGES] if kind == "zero" else [kind]:
        assert results[run, case]["same"]
        for name, weight in results[run, case]["weights"].items():
            if name != "norm":  # AdamW's fused kernel rounds by where a partition ends
                assert torch.equal(weight, alone[case, kind != "zero"][name]), (run, name)


def test_a_pair_that_zero_3_splits_is_refused_on_every_rank(trained):
    kind, results = trained
    assert ("split" in results) is (kind == "zero")
    for message in results.get("split", ()):
        assert "q_B is not in this one" in message
        assert "Raise sub_group_size" in message


# Settings that must make a difference, for the equality to mean something.
DIFFERENT = [
    ("factor", "product"),
    ("product", "tangent"),
    ("tangent", "without balance"),
    ("product", "bfloat16"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_the_comparison_can_fail(alone, one, other):
    for name in ("up_B", "down_B", "thin_A", "experts_B"):
        assert not torch.equal(alone[one, True][name], alone[other, True][name])


def test_how_the_work_is_divided_makes_no_difference(alone):
    for case, same in (("product", "product, owner"), ("product", "small buckets")):
        for name, weight in alone[case, True].items():
            assert torch.equal(weight, alone[same, True][name])


def test_a_missing_gradient_makes_a_difference(alone):
    assert not torch.equal(alone["product", True]["up_A"], alone["product", False]["up_A"])
