"""AdamW's state as Muon's and back, and schedules for other groups."""

import pytest
import torch
from torch import nn
from transformers import SchedulerType, get_scheduler

from hf_muon import Muon
from hf_muon.config import MuonConfig
from hf_muon.optimizer.conversion import as_after_a_window, reschedule, to_adamw, to_muon

SHAPES = {"matrix": (6, 4), "vector": (5,)}
BETA = 0.9  # AdamW's β₁


def parameters():
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}


def fed(optimizer, params, steps=5):
    """The optimizer after steps with the same gradients in every call."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


def adamw(params, lr=0.0):
    groups = [{"params": [params["matrix"]]}, {"params": [params["vector"]], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(BETA, 0.999))


def muon(params, lr=0.0, **settings):
    config = MuonConfig(lr=lr, **settings)
    halves = [
        {"params": [("matrix", params["matrix"])], **config.muon_group()},
        {"params": [("vector", params["vector"])], **config.adamw_group()},
    ]
    return Muon(halves, config=config)


def listed(params):
    """As the Trainer lists them, on the device on which models are built without weights."""
    return [[(name, p.detach().to("meta"))] for name, p in params.items()]


def converted(device="cpu", **settings):
    params = parameters()
    before = fed(adamw(params), params).state_dict()
    target = muon({name: p.detach().to(device) for name, p in params.items()}, **settings)
    return to_muon(before, listed(params), target)


def test_momentum_is_that_of_a_muon_with_the_momentum_of_adamw():
    def own(momentum):
        params = parameters()
        return fed(muon(params, momentum=momentum), params).state[params["matrix"]]["exp_avg"]

    found = converted()["state"][0]["exp_avg"]
    # A few roundings of float32 to numbers around 1.
    assert (found - own(BETA)).abs().max() < 1e-6
    assert (found - own(0.95)).abs().max() > 1e-2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_adamw_half_is_kept_and_a_loaded_muon_steps(device):
    params = parameters()
    before = fed(adamw(params), params).state_dict()
    state = converted(device)
    assert state["state"][1].keys() == before["state"][1].keys()
    for key, value in before["state"][1].items():
        assert torch.equal(state["state"][1][key], value)
    optimizer = muon(params)
    optimizer.load_state_dict(state)
    fed(optimizer, params, steps=1)
    assert optimizer.state[params["vector"]]["step"] == 6
    assert optimizer.state[params["matrix"]]["step"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "post_polar"},
        {"momentum": (0.9, 0.99)},
        {"prefilter": "norm"},
        {"momentum_dtype": "int8"},
    ],
)
def test_what_adamw_does_not_know_begins_with_zeros(settings):
    state = converted(**settings)["state"][0]
    assert not any(value.any() for value in state.values())
    assert converted()["state"][0]["exp_avg"].any()


def test_rules_that_keep_more_take_the_average():
    state = converted(rescale="entries")["state"][0]
    assert torch.equal(state["exp_avg"], converted()["state"][0]["exp_avg"])
    assert sum(not value.any() for value in state.values()) == 2  # the count, the squares
    assert converted(momentum_dtype="bfloat16")["state"][0]["exp_avg"].dtype == torch.bfloat16


def back(steps, lr=0.0, **settings):
    """The parameters and an AdamW that goes on after some steps of Muon, and Muon's state."""
    params = parameters()
    before = fed(muon(params, **settings), params, steps).state_dict()
    target = adamw(params, lr)
    own = [{**group, "weight_decay": 0.0} for group in target.state_dict()["param_groups"]]
    target.load_state_dict(to_adamw(before, listed(params), own))
    return params, target, before["state"]


def test_back_to_adamw_the_other_half_is_kept():
    params, target, before = back(5)
    for key, value in before[1].items():
        assert torch.equal(target.state[params["vector"]][key], value)


@pytest.mark.parametrize("steps", [1, 5, 60])
def test_back_to_adamw_bias_correction_gives_the_mean_of_the_gradients(steps):
    params, target, before = back(steps)
    state, beta = target.state[params["matrix"]], 0.95
    step = float(state["step"])
    assert step == pytest.approx(min(steps, 20))
    mean = before[0]["exp_avg"] / (1 - beta**steps)
    # Products and quotients in float32.
    assert torch.allclose(state["exp_avg"] / (1 - BETA**step), mean, rtol=1e-5)
    squares = state["exp_avg_sq"] / (1 - 0.999**step)
    for dim in (0, 1):  # what a product of means of rows and of columns keeps
        assert torch.allclose(squares.mean(dim), mean.square().mean(dim) / 0.04, rtol=1e-4)


def test_back_to_adamw_the_first_steps_have_the_size_of_its_own():
    def size(params, optimizer):
        kept = params["matrix"].detach().clone()
        fed(params=params, optimizer=optimizer, steps=1)
        return float((params["matrix"].detach() - kept).square().mean().sqrt()) / 1e-2

    params = parameters()
    optimizer = fed(adamw(params), params, 400)
    for group in optimizer.param_groups:
        group.update(lr=1e-2, weight_decay=0.0)
    own, found = size(params, optimizer), size(*back(400, lr=1e-2)[:2])
    afresh = size(*back(400, lr=1e-2, order="post_polar")[:2])
    assert found == pytest.approx(own, rel=0.5)
    assert afresh == pytest.approx(1.0, rel=1e-3)  # G/(|G| + ε)
    assert afresh > 3 * own


def test_back_to_adamw_stacks_kernels_and_zeros_are_finite():
    for shape in [(2, 3, 4), (4, 3, 2, 2), (3, 1)]:
        for size in (1.0, 1e-12, 1e25, 0.0):
            mean = size * torch.randn(shape)
            state = {"step": torch.tensor(7.0), "exp_avg": mean}
            found = as_after_a_window(state, 0.95, (0.9, 0.999))
            assert found["exp_avg_sq"].shape == torch.Size(shape)
            assert found["exp_avg_sq"].isfinite().all()
            assert found["exp_avg_sq"].any() == mean.any()


def test_state_of_other_optimizers_and_models_is_refused():
    params = parameters()
    optimizer = muon(params)
    before = fed(adamw(params), params).state_dict()
    with pytest.raises(ValueError, match=r"groups have \[2\] parameters; the Trainer's AdamW has"):
        to_muon(torch.optim.AdamW(params.values()).state_dict(), listed(params), optimizer)
    other = {**parameters(), "matrix": torch.ones(4, 6)}
    with pytest.raises(ValueError, match=r"shape \(6, 4\) and the parameter \(4, 6\).*--model"):
        to_muon(before, listed(other), optimizer)
    with pytest.raises(ValueError, match=r"shape \(6, 4\) and the parameter \(4, 6\)"):
        to_adamw(fed(muon(params), params).state_dict(), listed(other), [{}] * 2)
    before["state"][0] = {"state1": torch.ones(1), "state2": torch.ones(1)}
    with pytest.raises(ValueError, match=r"matrix holds \['state1', 'state2'\]; AdamW's step"):
        to_muon(before, listed(params), optimizer)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="do not train the same parameters: more is in one"):
        to_adamw(state, [*listed(params), [("more", torch.ones(1))]], [{}] * 3)
    for group in state["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match="does not name its parameters, so that they cannot"):
        to_adamw(state, listed(params), [{}] * 2)


# --- schedules ----------------------------------------------------------------------------------

STEPS, STOP = 12, 7
OF_LOSS = {"reduce_lr_on_plateau", "greedy"}
MORE = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


def scheduler_of(name, *rates):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups, lr=rates[0])
    scheduler = get_scheduler(name, optimizer, 2, STEPS, MORE.get(name))
    return optimizer, scheduler


def rates_after(optimizer, scheduler, steps):
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("name", [s.value for s in SchedulerType if s.value not in OF_LOSS])
def test_a_schedule_goes_on_as_that_of_the_new_groups(name):
    optimizer, scheduler = scheduler_of(name, 0.3, 0.3)
    rates_after(optimizer, scheduler, STOP)
    state = {k: v for k, v in scheduler.state_dict().items() if k != "optimizer"}
    groups = [{"lr": rate} for rate in (0.02, 0.02, 0.3)]
    state = reschedule(state, groups)

    optimizer, scheduler = scheduler_of(name, 0.02, 0.02, 0.3)
    own = rates_after(optimizer, scheduler, STEPS)
    # What is saved is a product and a quotient away from the new run's own rate; lr_end = 1e-7 of
    # the polynomial schedule is another share of another rate.
    near = 1e-4 if name == "polynomial" else 1e-12
    assert [g["lr"] for g in groups] == pytest.approx(own[STOP - 1], rel=near)
    assert [g["initial_lr"] for g in groups] == [0.02, 0.02, 0.3]

    optimizer, scheduler = scheduler_of(name, 0.02, 0.02, 0.3)
    scheduler.load_state_dict(state)
    assert rates_after(optimizer, scheduler, STEPS - STOP) == own[STOP:]


@pytest.mark.parametrize("name", sorted(OF_LOSS))
def test_schedules_that_follow_the_loss_are_refused(name):
    _, scheduler = scheduler_of(name, 0.3, 0.3)
    with pytest.raises(ValueError, match="does not hold a schedule that multiplies"):
        reschedule(scheduler.state_dict(), [{"lr": 0.3}])


def test_schedules_that_differ_between_groups_are_refused():
    optimizer, _ = scheduler_of("constant", 0.3, 0.3)
    factors = [lambda step: 1.0, lambda step: 0.5]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    with pytest.raises(ValueError, match="follow different schedules"):
        reschedule(scheduler.state_dict(), [{"lr": 0.3}])
