"""What ``hf-muon plan`` foretells is what the ranks of a run do."""

from unittest import mock

import pytest
import torch

from hf_muon import MuonConfig
from hf_muon.commands.imaginary import Parameter, World
from hf_muon.commands.plan import forecast
from hf_muon.distributed.layout import Matrix
from tests.distributed import counted, layouts
from tests.distributed.launch import launch

FULL = pytest.mark.full
LAUNCHES = [
    ("ddp", World("ddp", 2)),
    ("fsdp", World("fsdp2", 3)),
    ("hsdp", World("hsdp", 4, replicas=2)),
    pytest.param(("fsdp", World("fsdp2", 2)), marks=FULL),
    pytest.param(("zero1", World("zero1", 2)), marks=FULL),
    pytest.param(("zero2", World("zero2", 3)), marks=FULL),
    pytest.param(("zero3", World("zero3", 3)), marks=FULL),
]


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda param: f"{param[0]}{param[1].ranks}")
def run(request, tmp_path_factory):
    kind, world = request.param
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("counted") / "counts.pt"
    launch("counted", world.ranks, kind, out)
    return world, torch.load(out)


def foretold(model, world, **settings):
    with mock.patch.object(layouts, "SHAPES", counted.MODELS[model]):
        group = layouts.build_optimizer(layouts.Model()).param_groups[0]
    parameters = [
        Parameter(tuple(p.shape), tuple(Matrix(*matrix) for matrix in matrices))
        for p, matrices in zip(group["params"], group["matrices"], strict=True)
    ]
    config = MuonConfig(**{"polar_dtype": "float32", **settings})
    return forecast([parameters], config, world, device="cpu").ranks


def numbers(costs):
    return [(c.matrices, c.operations, c.exchanged, c.replicated, c.collectives) for c in costs]


def counted_numbers(ranks, world):
    copies = world.mesh[0] - 1  # an all-gather sends what it is given to each of the others
    return [
        (
            counts["matrices"],
            counts["operations"],
            counts.get("all_to_all_single bytes", 0),
            counts.get("all_gather_single bytes", 0) * copies,
            counts.get("all_to_all_single", 0) + counts.get("all_gather_single", 0),
        )
        for counts in ranks
    ]


@pytest.mark.parametrize("case", counted.CASES)
@pytest.mark.parametrize("model", counted.MODELS)
def test_work_bytes_and_collectives_of_every_rank_are_foretold(run, model, case):
    world, results = run
    expected = foretold(model, world, **counted.CASES[case])
    assert numbers(expected) == counted_numbers(results[model, case], world)


def test_the_comparison_can_fail(run):
    world, results = run
    other = foretold("many kinds", world, distribute="owner", polar_dtype="bfloat16")
    assert numbers(other) != counted_numbers(results["many kinds", "default"], world)


@pytest.mark.parametrize("case", counted.CASES)
def test_memory_is_foretold_roughly(run, case):
    """The estimate takes all outputs to be there in the last iteration, and leaves out temporaries
    of single pieces: a third either way. gloo may hold or copy what traveled."""
    world, results = run
    expected = foretold("large", world, **counted.CASES[case])
    for cost, counts in zip(expected, results["large", case], strict=True):
        assert 2 / 3 * cost.memory <= counts["memory"] <= 4 / 3 * cost.memory + 2 * cost.sent
