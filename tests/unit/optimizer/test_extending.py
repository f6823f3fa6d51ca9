"""The rules of docs/extending.md against float64, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from hf_muon import Muon, MuonConfig, rules
from hf_muon.diagnostics import replay
from hf_muon.rules import Buffer, register_filter, register_map, register_rescale
from tests.distributed.extended import register
from tests.reference import rules as reference
from tests.reference.muon import STEP_SIZES, exact_polar

LR = 0.02
CASES = {
    "two_terms": ({"filter": "two_terms"}, lambda: [reference.two_terms(), exact_polar]),
    "two_terms, post_polar": (
        {"filter": "two_terms", "order": "post_polar"},
        lambda: [exact_polar, reference.two_terms()],
    ),
    "clipped": ({"filter": "clipped"}, lambda: [reference.clipped(), exact_polar]),
    "nuclear": ({"matrix_map": "nuclear"}, lambda: [reference.ema(), reference.polargrad]),
    "rows": (
        {"rescale": "even_rows"},
        lambda: [reference.ema(), exact_polar, reference.rows()],
    ),
    "rows, polar_only": (
        {"rescale": "even_rows", "order": "polar_only"},
        lambda: [exact_polar, reference.rows()],
    ),
}
# float32 has 24 bits, 6e-8; an SVD and eight steps leave two digits of room.
FP32 = 1e-5


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


@pytest.fixture
def tables():
    """Names that a test registers are gone after it."""
    tables = (rules.FILTERS, rules.MAPS, rules.RESCALES)
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)
    rules._composed.cache_clear()


def trained(start, gradients, **settings):
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=LR, polar_method="svd", **settings)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("case", CASES)
def test_a_registered_rule_equals_its_formula(case, shape):
    settings, stages = CASES[case]
    start, gradients = 0.05 * torch.randn(shape), [torch.randn(shape) for _ in range(8)]
    weight, _ = trained(start, gradients, **settings)
    scale = STEP_SIZES["match_rms_adamw"](*shape)
    expected = reference.train(start, gradients, stages(), LR, scale)
    moved = (expected - start.double()).norm()
    assert (weight.double() - expected).norm() < FP32 * moved
    plain = reference.train(start, gradients, [reference.ema(), exact_polar], LR, scale)
    # The rows of a wide polar factor have one size already.
    changes_nothing = "rescale" in settings and shape[0] < shape[1]
    changed = (weight.double() - plain).norm() > 0.05 * moved
    assert bool(changed) is not (changes_nothing and "order" not in settings)


@pytest.mark.parametrize("case", CASES)
def test_replay_is_the_rule(case):
    settings, _ = CASES[case]
    start, gradients = torch.zeros(12, 20), [torch.randn(12, 20) for _ in range(4)]
    weight, _ = trained(start, gradients, adjust_lr="none", **settings)
    updates = replay(gradients, **settings)
    # Sums in another order: a few float32 roundings.
    assert torch.allclose(weight, -LR * updates.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_state_goes_through_checkpoints(case):
    settings, _ = CASES[case]
    start, gradients = torch.randn(12, 20), [torch.randn(12, 20) for _ in range(6)]
    through, _ = trained(start, gradients, **settings)
    halfway, optimizer = trained(start, gradients[:3], **settings)
    weight = nn.Parameter(halfway.clone())
    resumed = Muon([weight], lr=LR, polar_method="svd", **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients[3:]:
        weight.grad = gradient.clone()
        resumed.step()
    assert torch.equal(weight, through)
    names = {buffer.name for buffer in MuonConfig(**settings).rule.buffers}
    assert set(resumed.state[weight]) == {"step", *names}


def test_rows_have_one_size_after_the_first_step():
    settings = {"rescale": "even_rows", "adjust_lr": "none"}
    weight, _ = trained(torch.zeros(9, 6), [torch.randn(9, 6)], **settings)
    sizes = weight.norm(dim=1) / LR
    assert torch.allclose(sizes, torch.full((9,), (6 / 9) ** 0.5), atol=1e-5)  # ‖O‖ = √6


def test_stacks_have_numbers_for_each_row_of_each_matrix():
    start, gradient = torch.zeros(3, 6, 9), torch.randn(3, 6, 9)
    stack, optimizer = trained(start, [gradient], rescale="even_rows")
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["row_avg"].shape == (3, 6)
    for one, g in zip(stack, gradient, strict=True):
        alone, _ = trained(start[0], [g], rescale="even_rows")
        assert torch.allclose(one, alone, atol=1e-7)


def test_names_are_values_of_settings():
    config = MuonConfig.from_optim_args(
        "filter=two_terms,matrix_map=nuclear,rescale=even_rows", lr=1
    )
    assert MuonConfig(**config.to_dict()) == config
    with pytest.raises(
        ValueError, match=r"filter='two_term' is not one of .* Did you mean 'two_terms'"
    ):
        MuonConfig(filter="two_term")


@pytest.mark.parametrize("register_it", [register_filter, register_map, register_rescale])
@pytest.mark.parametrize("name", ["ema", "polar", "none", "product", "two terms", "", 3])
def test_names_that_cannot_be_registered(register_it, name, tables):
    with pytest.raises(ValueError, match=f"cannot be registered as {name!r}"):
        register_it(name, lambda *_: None)


def doubled(x, buffers, given):
    for one in x:
        one.mul_(2)
    return x


WRONG = {
    "another shape": (register_filter, lambda x, *_: [one[:1] for one in x], "does not give"),
    "one too few": (register_filter, lambda x, *_: x[1:], "does not give"),
    "whole numbers": (register_rescale, lambda x, *_: [one.int() for one in x], "does not give"),
    "no tensor": (register_map, lambda X, polar, settings: None, "does not give"),
    "changed input": (register_rescale, doubled, "doubled.* changes its input"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_strangers_function_may_not_do_shows_when_the_optimizer_is_built(case, tables):
    register_it, run, message = WRONG[case]
    register_it("wrong", run)
    field = {register_filter: "filter", register_map: "matrix_map"}.get(register_it, "rescale")
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.zeros(3, 4))], lr=LR, **{field: "wrong"})


def test_functions_are_tried_in_the_dtypes_that_they_will_get(tables):
    def careless(x, buffers, given):
        for gradient, average in zip(x, *buffers, strict=True):
            average.lerp_(gradient, 0.1)
        return buffers[0]

    register_filter("careless", careless)
    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
    Muon([weight], lr=LR, filter="careless", momentum_dtype="bfloat16")
    with pytest.raises(RuntimeError, match="dtype"):
        Muon([weight], lr=LR, filter="careless", momentum_dtype="float32")


def test_buffers_of_one_name_are_refused(tables):
    register_rescale("kept", lambda x, *_: x, [Buffer("exp_avg")])
    with pytest.raises(ValueError, match="buffers of one name"):
        Muon([nn.Parameter(torch.zeros(3, 4))], lr=LR, rescale="kept")


def test_a_rule_that_this_process_does_not_know_is_named(tables):
    optimizer = Muon([nn.Parameter(torch.zeros(3, 4))], lr=LR, filter="two_terms")
    del rules.FILTERS["two_terms"]
    rules._composed.cache_clear()
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="filter='two_terms' is not registered in this process"):
        optimizer.step()
