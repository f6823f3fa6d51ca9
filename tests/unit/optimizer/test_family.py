"""Filters, maps, rescalings and writes against their formulas, and what each is known for."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_muon import Muon, MuonConfig
from hf_muon.diagnostics import replay
from hf_muon.diagnostics.synthetic import spiked_stream
from tests.reference import family as of
from tests.reference import rules as reference
from tests.reference.muon import STEP_SIZES, exact_polar

LR, STEPS = 0.02, 8
POLAR = [exact_polar]


def ema():
    return reference.ema()


# case -> settings, stages, and what writes.
CASES = {
    "two terms": (
        {"momentum": (0.9, 0.98), "momentum_weights": (0.44, 0.56)},
        lambda: [of.kernel((0.9, 0.98), (0.44, 0.56)), exact_polar],
    ),
    "equal terms, plain": (
        {"momentum": (0.5, 0.9, 0.95, 0.99), "nesterov": False},
        lambda: [of.kernel((0.5, 0.9, 0.95, 0.99), (0.25,) * 4, nesterov=False), exact_polar],
    ),
    "two terms, post_polar": (
        {"momentum": (0.5, 0.9), "order": "post_polar"},
        lambda: [exact_polar, of.kernel((0.5, 0.9), (0.5, 0.5))],
    ),
    "linear warmup and cooldown": (
        {
            "momentum": 0.9, "momentum_start": 0.5, "momentum_warmup_steps": 2,
            "momentum_end": 0.6, "momentum_cooldown_start": 4, "momentum_cooldown_steps": 3,
        },
        lambda: [of.changing((0.5, 0.7, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6)), exact_polar],
    ),
    "cosine cooldown": (
        {
            "momentum": 0.9, "momentum_end": 0.5, "momentum_cooldown_steps": 4,
            "momentum_schedule": "cosine",
        },
        lambda: [
            of.changing([0.7 + 0.2 * math.cos(math.pi * min(t, 4) / 4) for t in range(STEPS)]),
            exact_polar,
        ],
    ),
    "clip": (
        {"prefilter": "clip", "prefilter_threshold": 1.5},
        lambda: [of.clip(1.5), ema(), exact_polar],
    ),
    "clip, polar_only": (
        {"prefilter": "clip", "prefilter_threshold": 1.0, "order": "polar_only"},
        lambda: [of.clip(1.0), exact_polar],
    ),
    "norm": ({"prefilter": "norm"}, lambda: [of.norm, ema(), exact_polar]),
    "polargrad": ({"matrix_map": "polargrad"}, lambda: [ema(), of.polargrad]),
    "soft": ({"matrix_map": "soft", "map_power": 0.4}, lambda: [ema(), of.soft(0.4)]),
    "rows": ({"rescale": "rows", "rescale_beta": 0.8}, lambda: [ema(), exact_polar, of.rows(0.8)]),
    "rows, post_polar": (
        {"rescale": "rows", "order": "post_polar"},
        lambda: [exact_polar, ema(), of.rows()],
    ),
    "entries": ({"rescale": "entries"}, lambda: [ema(), exact_polar, of.entries()]),
    "entries, polar_only": (
        {"rescale": "entries", "order": "polar_only"},
        lambda: [exact_polar, of.entries()],
    ),
    "two terms, entries": (
        {"momentum": (0.5, 0.9), "rescale": "entries"},
        lambda: [of.kernel((0.5, 0.9), (0.5, 0.5)), exact_polar, of.entries()],
    ),
    "frobenius": (
        {"rescale": "frobenius", "matrix_map": "polargrad"},
        lambda: [ema(), of.polargrad, of.frobenius],
    ),
    "relative": ({"step_rule": "relative"}, lambda: [ema(), exact_polar], of.relative),
    "hyperball": ({"step_rule": "hyperball"}, lambda: [ema(), exact_polar], of.hyperball),
}  # fmt: skip
# float32 has 24 bits, 6e-8; an SVD and eight steps leave two digits of room.
FP32 = 1e-5


def trained(start, gradients, **settings):
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], **{"lr": LR, "polar_method": "svd", **settings})
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer


def draw(*shape, steps=STEPS):
    return 0.05 * torch.randn(shape), [torch.randn(shape) for _ in range(steps)]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case, shape):
    settings, stages, *write = CASES[case]
    start, gradients = draw(*shape)
    weight, _ = trained(start, gradients, **settings)
    scale = STEP_SIZES["match_rms_adamw"](*shape)
    expected = of.train(start, gradients, stages(), LR, scale, *write)
    moved = (expected - start.double()).norm()
    assert (weight.double() - expected).norm() < FP32 * moved
    plain = of.train(start, gradients, [reference.ema(), exact_polar], LR, scale)
    # The rows of a wide polar factor have one size already, and its norm is the square root of m.
    same = case == "frobenius" or (case == "rows" and shape[0] < shape[1])
    assert bool((weight.double() - plain).norm() < 0.01 * moved) is same


@pytest.mark.parametrize("case", [case for case in CASES if len(CASES[case]) == 2])
def test_replay_is_the_rule(case):
    settings, _ = CASES[case]
    start, gradients = torch.zeros(12, 20), [torch.randn(12, 20) for _ in range(4)]
    weight, _ = trained(start, gradients, adjust_lr="none", **settings)
    updates = replay(gradients, **settings)
    # Sums in another order: a few float32 roundings.
    assert torch.allclose(weight, -LR * updates.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["parameter", "int8"])
@pytest.mark.parametrize("case", [*CASES, "auto"])
def test_resumes_bit_by_bit(case, dtype):
    settings = {**(CASES[case][0] if case in CASES else {"momentum": "auto"})}
    settings["momentum_dtype"] = None if dtype == "parameter" else dtype
    start, gradients = draw(3, 12, 20, steps=6)
    through, _ = trained(start, gradients, **settings)
    halfway, optimizer = trained(start, gradients[:3], **settings)
    weight = nn.Parameter(halfway.clone())
    resumed = Muon([weight], lr=LR, polar_method="svd", **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients[3:]:
        weight.grad = gradient.clone()
        resumed.step()
    assert torch.equal(weight, through)
    fresh, _ = trained(halfway, gradients[3:], **settings)
    stateless = case == "clip, polar_only"  # but for a median, which moves slowly
    assert stateless or not torch.equal(fresh, through)


@pytest.mark.parametrize("case", CASES)
def test_stacks_are_matrices_of_their_own(case):
    settings = CASES[case][0]
    start, gradients = draw(3, 6, 9, steps=3)
    stack, _ = trained(start, gradients, **settings)
    for i in range(3):
        alone, _ = trained(start[i], [gradient[i] for gradient in gradients], **settings)
        assert torch.allclose(stack[i], alone, rtol=0, atol=1e-6)


# --- filters --------------------------------------------------------------------------------------


def test_a_kernel_of_one_term_gives_todays_bits():
    start, gradients = draw(30, 20)
    expected, _ = trained(start, gradients, momentum=0.9)
    assert torch.equal(trained(start, gradients, momentum=(0.9,))[0], expected)
    same = trained(start, gradients, momentum=(0.9, 0.9), momentum_weights=(0.25, 0.75))[0]
    assert torch.allclose(same, expected, atol=1e-6)
    assert MuonConfig(momentum=[0.9]).momentum == 0.9


def test_two_terms_fit_the_slots_of_adam():
    for settings, names in [
        ({"momentum": (0.9, 0.98)}, {"exp_avg", "exp_avg_sq"}),
        ({"momentum": (0.9, 0.95, 0.98)}, {"exp_avg", "exp_avg_sq", "exp_avg_3"}),
        ({"momentum": (0.9, 0.98), "rescale": "entries"}, {"exp_avg", "exp_avg_2", "exp_avg_sq"}),
        ({"rescale": "entries"}, {"exp_avg", "exp_avg_sq"}),
    ]:
        assert {buffer.name for buffer in MuonConfig(**settings).rule.buffers} == names


def test_momenta_of_parameters_share_a_group():
    starts = [torch.randn(12, 20), torch.randn(20, 12)]
    gradients = [[torch.randn_like(w) for w in starts] for _ in range(4)]
    weights = [nn.Parameter(w.clone()) for w in starts]
    optimizer = Muon([{"params": weights, "momenta": (0.5, 0.9)}], lr=LR, polar_method="svd")
    for step in gradients:
        for w, g in zip(weights, step, strict=True):
            w.grad = g.clone()
        optimizer.step()
    for i, beta in enumerate((0.5, 0.9)):
        alone, _ = trained(starts[i], [step[i] for step in gradients], momentum=beta)
        assert torch.equal(weights[i].detach(), alone)


@pytest.mark.parametrize(
    ("momenta", "said"),
    [
        ((0.5,), "2 parameters"),
        ((0.5, 1.0), r"momenta\[1\]=1.0 is out of range"),
        (("auto", 0.5), r"momenta\[0\]='auto' is of type str"),
        (((0.5, 0.9), 0.5), r"momenta\[0\]=\(0.5, 0.9\)"),
    ],
)
def test_momenta_are_checked(momenta, said):
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    with pytest.raises(ValueError, match=said):
        Muon([{"params": weights, "momenta": momenta}], lr=LR)


@pytest.mark.parametrize("case", [*(case for case in CASES if case != "hyperball"), "auto", "int8"])
def test_what_has_no_gradient_can_be_left_as_it_is(case):
    others = {"auto": {"momentum": "auto"}, "int8": {"momentum_dtype": "int8"}}
    settings = others.get(case) or CASES[case][0]
    start, gradients = draw(12, 20, steps=2)
    gradients = [*gradients, torch.zeros(12, 20)]
    weight, _ = trained(start, gradients, skip_zero_gradients=True, **settings)
    assert torch.equal(weight, trained(start, gradients[:2], **settings)[0])


def test_momenta_say_what_the_next_step_uses():
    start, gradients = draw(12, 20, steps=2)
    name = "parameter 0 of shape (12, 20)"
    for settings, expected in [
        ({"momentum": 0.9}, 0.9),
        ({"momentum": (0.9, 0.98)}, (0.9, 0.98)),
        ({"momentum": "auto"}, 0.95),
        ({"momentum_end": 0.85, "momentum_cooldown_steps": 4}, pytest.approx(0.9)),
    ]:
        _, optimizer = trained(start, gradients, **settings)
        assert optimizer.momenta() == {name: [expected]}


@pytest.mark.parametrize("momentum", [0, np.float64(0.5), torch.tensor(0.5)])
def test_one_beta_may_be_written_in_any_kind_of_number(momentum):
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([weight], lr=LR)
    optimizer.param_groups[0]["momentum"] = momentum
    weight.grad, before = torch.randn(4, 4), weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("momentum", [(0.9, 0.95), "auto"])
def test_schedulers_that_cycle_momentum_refuse_several(momentum):
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([weight], lr=LR, momentum=momentum)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    optimizer = Muon([{"params": [weight], "momentum": momentum}], lr=LR)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    weight.grad, before = torch.randn(4, 4), weight.detach().clone()
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_one_number_in_a_group_does_without_the_weights_of_a_kernel():
    weight = nn.Parameter(torch.randn(4, 4))
    settings = {"momentum": (0.9, 0.98), "momentum_weights": (0.4, 0.6)}
    optimizer = Muon([{"params": [weight], "momentum": 0.5}], lr=LR, **settings)
    assert optimizer.param_groups[0]["momentum_weights"] == ()


def test_a_checkpoint_from_before_the_family_goes_on():
    start, gradients = draw(12, 20)
    through, _ = trained(start, gradients)
    halfway, optimizer = trained(start, gradients[:4])
    older = optimizer.state_dict()
    new = (
        "momentum_weights", "prefilter", "prefilter_threshold", "map_power", "rescale_beta",
        "step_rule", "momentum_end", "momentum_cooldown_start", "momentum_cooldown_steps",
        "momentum_schedule",
    )  # fmt: skip
    for name in new:
        del older["param_groups"][0][name]
    weight = nn.Parameter(halfway.clone())
    for settings in ({}, {"momentum": (0.9, 0.98), "momentum_weights": (0.4, 0.6)}):
        resumed = Muon([weight], lr=LR, polar_method="svd", **settings)
        if settings:
            with pytest.warns(UserWarning, match="momentum=0.95"):
                resumed.load_state_dict(older)
        else:
            resumed.load_state_dict(older)
            for gradient in gradients[4:]:
                weight.grad = gradient.clone()
                resumed.step()
            assert torch.equal(weight, through)


def test_momenta_of_a_checkpoint_are_not_dropped():
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    with_momenta = Muon([{"params": weights, "momenta": (0.5, 0.9)}], lr=LR)
    with pytest.raises(ValueError, match=r"momenta=\(0.5, 0.9\)"):
        Muon(weights, lr=LR).load_state_dict(with_momenta.state_dict())


def alignment(update, signal):
    return float((update * signal).sum() / torch.linalg.matrix_norm(signal, "nuc"))


def aligned(gradients, signal, **settings):
    updates = replay(gradients, momentum=0.99, nesterov=False, **settings)
    return sum(alignment(update, signal) for update in updates[300::50]) / len(updates[300::50])


def stream(noise, steps=500, seed=0, **settings):
    made = list(spiked_stream(64, 64, [0.5], steps=steps, noise=noise, seed=seed, **settings))
    return [one.gradient for one in made], made[0].signal


def test_clipping_restores_a_signal_under_heavy_tails():
    gradients, signal = stream("student_t", sigma=1 / 8, degrees_of_freedom=1.5)
    assert aligned(gradients, signal, prefilter="clip") > 0.9
    assert aligned(gradients, signal) < 0.7


def test_clipping_costs_nothing_without_them():
    gradients, signal = stream("gaussian", sigma=1 / 8)
    plain = aligned(gradients, signal)
    assert aligned(gradients, signal, prefilter="clip") > 0.99 * plain > 0.9


@pytest.mark.parametrize("prefilter", ["clip", "norm"])
def test_one_spike_does_not_own_the_average(prefilter):
    gradients, signal = stream("gaussian", sigma=1 / 8, steps=400)
    calm = aligned(gradients, signal, prefilter=prefilter)
    gradients[290] = 1000 * torch.randn(64, 64)
    assert aligned(gradients, signal, prefilter=prefilter) > 0.95 * calm
    assert aligned(gradients, signal) < 0.1


def test_entries_of_zero_do_not_pull_the_median_down():
    gradients = [torch.randn(20, 20) * (torch.rand(20, 20) < 0.2) for _ in range(200)]
    _, optimizer = trained(torch.zeros(20, 20), gradients, prefilter="clip")
    [state] = optimizer.state.values()
    assert 0.5 < float(state["median"]) < 0.9  # of abs(N(0, 1)) it is 0.674


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [*CASES, "auto", "int8"])
def test_trains_in_every_dtype(case, dtype):
    others = {"auto": {"momentum": "auto"}, "int8": {"momentum_dtype": "int8"}}
    settings = {"momentum_dtype": "float32", **(others.get(case) or CASES[case][0])}
    start, gradients = draw(12, 20, steps=3)
    # Of 1e-6 the norm is representable in float16, and not one over it.
    small = [1e-6 * gradient.to(dtype) for gradient in gradients]
    weight, _ = trained(start.to(dtype), small, **settings)
    assert torch.isfinite(weight).all()
    # An update of the size of the gradient rounds away.
    assert torch.equal(weight, start.to(dtype)) is (case == "polargrad" and dtype.itemsize == 2)


# --- rescalings and writes ------------------------------------------------------------------------


def test_rows_have_one_size_after_the_first_step_and_may_be_permuted():
    gradient, order = torch.randn(9, 6), torch.randperm(9)
    settings = {"rescale": "rows", "adjust_lr": "none"}
    weight, _ = trained(torch.zeros(9, 6), [gradient], **settings)
    assert torch.allclose(weight.norm(dim=1) / LR, torch.full((9,), (6 / 9) ** 0.5), atol=1e-5)
    permuted, _ = trained(torch.zeros(9, 6), [gradient[order]], **settings)
    assert torch.allclose(permuted, weight[order], atol=1e-6)


@pytest.mark.parametrize("rescale", ["rows", "entries"])
def test_the_norm_of_an_update_stays(rescale):
    gradients = [torch.randn(9, 6) for _ in range(5)]
    for update in replay(gradients, rescale=rescale):
        assert float(update.norm()) == pytest.approx(6**0.5, rel=1e-5)


@pytest.mark.parametrize("rescale", ["none", "rows", "entries", "frobenius"])
def test_zero_gradients_leave_weights_as_they_are(rescale):
    start = torch.randn(9, 6)
    weight, _ = trained(start, [torch.zeros(9, 6)] * 2, rescale=rescale)
    assert torch.equal(weight, start)
