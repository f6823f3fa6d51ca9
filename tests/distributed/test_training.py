"""Real training on several ranks equals one process up to the order of sums in the gradients."""

import pytest
import torch

from hf_muon import route
from tests.distributed import training
from tests.distributed.launch import launch

FULL = pytest.mark.full
LAUNCHES = [
    ("zero0,zero1,zero2,zero3", 2),
    pytest.param(("ddp,fsdp,fsdp offloaded", 2), marks=FULL),
    pytest.param(("ddp,fsdp,zero1,zero2,zero3", 3), marks=FULL),
    pytest.param(("hsdp,fsdp", 4), marks=FULL),
    pytest.param(
        (",".join(kind for kind in training.VARIANTS if kind.startswith("zero")), 2), marks=FULL
    ),
]
# Gradients are float32 sums over ranks, taken in another order than in one process, and averaged:
# some roundings, of weights below one for matrices and around one for norms.
MATRICES, ACCUMULATED, NORMS = 2e-7, 5e-7, 2.5e-7
# Products of adapters have entries up to 2e-3; rounding of a gradient counts a hundredfold in them.
PRODUCTS = 6e-8
# AdamW divides by √v + ε: where a gradient is about as small as ε = 1e-8, rounding moves the step
# by percents of the learning rate of 1e-3.
EMBEDDINGS = 5e-5


@pytest.fixture(scope="module")
def alone():
    return {case: training.train("one", **settings) for case, settings in training.CASES.items()}


@pytest.fixture(scope="module", params=LAUNCHES, ids=lambda param: f"{param[0]} on {param[1]}")
def results(request, tmp_path_factory):
    kinds, processes = request.param
    out = tmp_path_factory.mktemp("training") / "results.pt"
    launch("training", processes, kinds, out, timeout=280)
    return torch.load(out)


def largest(result, expected, names):
    return max(
        (result["weights"][name] - expected["weights"][name]).abs().max().item() for name in names
    )


def test_equals_one_process(results, alone):
    plan = route(training.tiny_llama())
    matrices = [one.name for one in plan.muon]
    vectors = [one.name for one in plan.adamw if len(one.shape) == 1]
    tables = [one.name for one in plan.adamw if len(one.shape) == 2]
    assert len(matrices) == 14
    for (kind, case), result in results.items():
        if case in training.PAIRS:
            continue
        differences = [largest(result, alone[case], names) for names in (matrices, vectors, tables)]
        allowed = (ACCUMULATED if case == "accumulated" else MATRICES, NORMS, EMBEDDINGS)
        fine = [d <= bound for d, bound in zip(differences, allowed, strict=True)]
        assert all(fine), (kind, case, differences)


def test_adapters_equal_those_of_one_process(results, alone):
    for (kind, case), result in results.items():
        if case in training.PAIRS:
            here, there = products(result), products(alone[case])
            assert len(here) == 14
            differences = [(here[name] - there[name]).abs().max().item() for name in here]
            assert max(differences) <= PRODUCTS, (kind, case)


def products(result):
    """BA of each adapter, by name of A: what the model sees.

    A alone is not comparable: where B has just left zero, a step of BA that is as small as B moves
    A by as much as A is, and errors with it.
    """
    weights = {name: weight.double() for name, weight in result["weights"].items()}
    return {
        name: weights[name.replace("lora_A", "lora_B")] @ weights[name]
        for name in weights
        if "lora_A" in name
    }


def test_the_logged_norm_is_that_of_the_whole_gradient(results, alone):
    for (kind, case), result in results.items():
        if kind != "zero0":  # DeepSpeed knows no norm there
            # The gradient of B is that of the weight times A, which is off by some 1e-5 of itself.
            rel = 2e-5 if case in training.PAIRS else 1e-6
            assert result["norms"] == pytest.approx(alone[case]["norms"], rel=rel), (kind, case)


def test_the_launch_shards_what_it_should(results):
    for (kind, _), result in results.items():
        sharded = kind.startswith(("fsdp", "hsdp"))
        assert result["sharded"] == ({True} if sharded else set() if "zero" in kind else {False})


def test_the_weights_move_and_the_cases_differ(alone):
    start = dict(training.tiny_llama().named_parameters())
    weights = {case: result["weights"] for case, result in alone.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights["pre_polar"][name] - start[name]).abs().max() > 1e-3
    assert (weights["pre_polar"][name] - weights["polar_only"][name]).abs().max() > 1e-4
    assert max(alone["pre_polar"]["norms"]) > 1  # so that gradients are clipped


def test_the_products_move_and_their_updates_differ(alone):
    by_product, by_tangent = (products(alone[case]) for case in training.PAIRS)
    for name, one in by_product.items():  # they start at zero
        assert one.abs().max() > 1000 * PRODUCTS
        assert (one - by_tangent[name]).abs().max() > 1000 * PRODUCTS
