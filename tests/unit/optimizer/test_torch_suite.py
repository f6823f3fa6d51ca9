"""The situations of torch's own optimizer tests (test/test_optim.py, 2.13), for this optimizer.

The code is ours: torch's tables (``torch.testing._internal.common_optimizers``) need a package of
its test machinery that no user has. What cannot hold here:

* lazily created state: ours is created for all trained parameters at the first step, with or
  without a gradient, so that ranks agree and checkpoints are whole;
* a step on zero gradients that does nothing: momentum goes on, and weights decay, as in torch's;
* ``maximize``, ``capturable``, ``differentiable``, ``amsgrad`` and graph capture: refused;
* complex and sparse gradients: refused in the step; bad gradients raise and do not spread;
* a tensor as learning rate that the caller goes on writing to: it is read once;
* wrong parameters and keys of groups are in ``test_group_keys.py``;
* ``foreach`` against a loop over tensors: there is one implementation; the AdamW half's kernels are
  in ``test_adamw.py``, and what needs several GPUs or their memory counters in ``tests/gpu``.
"""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hf_muon import Muon
from tests.unit.optimizer.test_checkpoint import through_a_file
from tests.unit.optimizer.test_loading import same

KINDS = {
    "pre_polar": {},
    "post_polar": {"order": "post_polar", "match_update_rms": True},
    "polar_only": {"order": "polar_only"},
    "decay": {"weight_decay": 0.3, "nesterov": False},
    "own dtype": {"momentum_dtype": "float64"},
}
every_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (5,), (3, 4, 2), (4, 4))
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def build(tensors, named=False, **settings):
    pairs = [(f"p{i}", p) if named else p for i, p in enumerate(tensors)]
    groups = [
        {"params": [pairs[0], pairs[2], pairs[3]]},
        {"params": [pairs[1]], "algorithm": "adamw"},
    ]
    return Muon(groups, **{"lr": 0.05, **settings})


def loss_of(tensors):
    return sum((p - 1).square().sum() for p in tensors)


def step(optimizer, tensors, times=1):
    for _ in range(times):
        optimizer.zero_grad()
        loss_of(tensors).backward()
        optimizer.step()


def trained(times=2, **settings):
    tensors = parameters()
    optimizer = build(tensors, **settings)
    step(optimizer, tensors, times)
    return tensors, optimizer


# --- direction, learning rates, closures ---------------------------------------------------------

SCHEDULES = {
    "none": lambda o: None,
    "step": lambda o: StepLR(o, step_size=3, gamma=0.9),
    "chain": lambda o: ExponentialLR(o, gamma=0.95),
    "linear": lambda o: LinearLR(o, start_factor=0.4, total_iters=4),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=2),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("contiguous", [True, False])
@every_kind
def test_the_loss_goes_down(settings, contiguous, schedule):
    tensors = parameters()
    if not contiguous:
        tensors[0] = nn.Parameter(torch.randn(6, 4, 2)[..., 0])
        tensors[1] = nn.Parameter(torch.randn(5, 2)[..., 1])
        tensors[3] = nn.Parameter(torch.randn(4, 4).t())
    optimizer = build(tensors, **settings)
    scheduler = schedule(optimizer)
    before = loss_of(tensors).item()
    for _ in range(10):
        step(optimizer, tensors)
        if scheduler is not None:
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(*([loss_of(tensors).item()] if plateau else []))
    assert loss_of(tensors).item() < before


def test_groups_have_their_own_learning_rate_and_decay():
    tensors = parameters()
    optimizer = Muon([{"params": [tensors[0]], "lr": 0.0}, {"params": [tensors[3]]}], lr=0.1)
    still, moving = tensors[0].detach().clone(), tensors[3].detach().clone()
    step(optimizer, [tensors[0], tensors[3]])
    assert torch.equal(tensors[0], still)
    assert not torch.equal(tensors[3], moving)


@pytest.mark.parametrize("lr", [torch.tensor(0.05), torch.tensor([0.05]), torch.tensor([[0.05]])])
@pytest.mark.parametrize("place", ["settings", "group", "later"])
def test_a_tensor_learning_rate_is_the_number_in_it(lr, place):
    def build_one(rate):
        tensors = parameters()
        if place == "settings":
            return tensors, build(tensors, lr=rate)
        first = {"lr": rate} if place == "group" else {}
        optimizer = Muon([{"params": [tensors[0]], **first}], lr=0.5)
        optimizer.add_param_group({"params": [tensors[1]], "algorithm": "adamw", "lr": rate})
        if place == "later":  # as users set it between steps
            optimizer.param_groups[0]["lr"] = torch.as_tensor(rate).flatten()[0]
        return tensors, optimizer

    (one, optimizer), (other, reference) = build_one(lr), build_one(float(lr))
    step(optimizer, one, 3)
    step(reference, other, 3)
    assert same(one, other)


@every_kind
def test_a_closure_is_called_with_gradients_and_its_loss_is_returned(settings):
    tensors, others = parameters(), parameters()
    optimizer, reference = build(tensors, **settings), build(others, **settings)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(tensors)
        loss.backward()
        return loss

    expected = loss_of(tensors).item()
    assert optimizer.step(closure).item() == expected
    step(reference, others)
    assert same(tensors, others)


def test_no_gradients_at_all_change_nothing():
    tensors = parameters()
    before = [p.detach().clone() for p in tensors]
    optimizer = build(tensors, weight_decay=0.5)
    optimizer.step()
    assert same(before, tensors)
    assert all(float(s["step"]) == 0 for s in optimizer.state.values())


def test_empty_tensors_are_for_adamw_and_do_nothing():
    empty, matrix = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.eye(3))
    optimizer = Muon([{"params": [matrix]}, {"params": [empty], "algorithm": "adamw"}], lr=0.1)
    step(optimizer, [empty, matrix], 2)
    assert empty.shape == (0, 3)
    other = copy.deepcopy(optimizer)
    other.load_state_dict(through_a_file(optimizer.state_dict()))


def test_gradients_are_read_and_not_written():
    tensors, optimizer = trained(1, weight_decay=0.1)
    loss_of(tensors).backward()
    before = [p.grad.clone() for p in tensors]
    optimizer.step()
    assert same(before, [p.grad for p in tensors])


def test_zero_grad_clears_or_zeroes():
    tensors, optimizer = trained(1)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in tensors)
    optimizer.zero_grad()
    assert all(p.grad is None for p in tensors)


# --- state dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [(False, False), (True, True), (True, False), (False, True)])
@every_kind
def test_a_state_dict_round_trip_is_exact(settings, named):
    tensors, optimizer = trained(named=named[0], **settings)
    others = copy.deepcopy(tensors)
    other = build(others, named=named[1], **settings)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    if named[0] == named[1]:
        assert same(optimizer.state_dict(), other.state_dict())
    for _ in range(3):
        step(optimizer, tensors)
        step(other, others)
    assert same(tensors, others)
    assert ("param_names" in other.param_groups[0]) == any(named)


@every_kind
def test_a_state_dict_does_not_depend_on_when_it_is_asked_for(settings):
    optimizer = trained(**settings)[1]
    one = copy.deepcopy(optimizer.state_dict())
    assert same(one, optimizer.state_dict())
    assert list(one["state"]) == list(range(4))
    groups = one["param_groups"]
    assert [i for group in groups for i in group["params"]] == list(range(4))


@every_kind
def test_an_older_state_dict_is_loaded(settings):
    """Python numbers as step counts, and no key that a newer version has added."""
    tensors, optimizer = trained(**settings)
    others = copy.deepcopy(tensors)
    older = copy.deepcopy(optimizer.state_dict())
    for state in older["state"].values():
        state["step"] = float(state["step"])
    for group in older["param_groups"]:
        for key in {"group_id", "lora_damping", "compile", "eps"} & group.keys():
            del group[key]
        group["fused"] = True
    other = build(others, **settings)
    other.load_state_dict(through_a_file(older))
    assert "fused" not in other.param_groups[1]
    step(optimizer, tensors, 2)
    step(other, others, 2)
    assert same(tensors, others)


def test_an_older_pickle_is_completed():
    tensors, optimizer = trained()
    older = optimizer.__getstate__()
    older = {**older, "param_groups": [{**group} for group in older["param_groups"]]}
    del older["param_groups"][0]["lora_damping"]
    for state in older["state"].values():
        state["step"] = float(state["step"])
    again = Muon.__new__(Muon)
    again.__setstate__(older)
    step(again, tensors)
    assert again.param_groups[0]["lora_damping"] == optimizer.config.lora_damping
    assert {float(s["step"]) for s in again.state.values()} == {3.0}


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float64])
def test_loaded_buffers_take_the_dtype_of_their_parameters_and_counts_keep_theirs(to):
    _, optimizer = trained()
    others = parameters(to)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of momentum in bfloat16
        other = build(others)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in others:
        state = other.state[p]
        assert {v.dtype for k, v in state.items() if k != "step"} == {to}
        assert state["step"].dtype == torch.float32


@pytest.mark.parametrize("difference", ["fewer groups", "fewer parameters", "another algorithm"])
def test_a_state_dict_of_other_groups_is_refused(difference):
    optimizer = trained()[1]
    others = parameters()
    other = {
        "fewer groups": lambda: Muon([others[0], others[2], others[3]], lr=0.05),
        "fewer parameters": lambda: Muon(
            [{"params": others[2:]}, {"params": [others[1]], "algorithm": "adamw"}], lr=0.05
        ),
        "another algorithm": lambda: Muon(
            [{"params": [others[0], others[2], others[3]]}, {"params": [parameters()[0]]}], lr=0.05
        ),
    }[difference]()
    with pytest.raises(ValueError, match="checkpoint"):
        other.load_state_dict(optimizer.state_dict())


def test_loading_does_not_alter_what_is_loaded():
    optimizer = trained()[1]
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    build(parameters()).load_state_dict(saved)
    assert same(before, saved)


# --- copies --------------------------------------------------------------------------------------


def through_a_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved_whole(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_a_pickle, saved_whole])
@every_kind
def test_copies_train_as_the_original_would(settings, copied):
    optimizer = trained(**settings)[1]
    expected, reference = trained(3, **settings)
    other = copied(optimizer)
    held = [p for group in other.param_groups for p in group["params"]]
    order = [held[0], held[3], held[1], held[2]]
    step(other, order)
    assert same(order, expected)
    assert {k for k in vars(optimizer) if k[0] != "_"} == {k for k in vars(other) if k[0] != "_"}
    assert repr(other) == repr(reference)
    assert "Parameter Group 1" in repr(other)


# --- hooks ---------------------------------------------------------------------------------------


def test_step_hooks_run_around_every_step():
    tensors, optimizer = trained(1)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all after")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    try:
        step(optimizer, tensors)
    finally:
        for handle in handles:
            handle.remove()
    step(optimizer, tensors)
    assert calls == ["all before", "before", "after", "all after"]


@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks_run_in_order_and_may_replace_it(prepend):
    _, optimizer = trained(1)
    calls = []
    note = functools.partial(lambda text, *_: calls.append(text))
    optimizer.register_state_dict_pre_hook(functools.partial(note, "before 1"))
    optimizer.register_state_dict_pre_hook(functools.partial(note, "before 2"), prepend=prepend)
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "tag": "x"})
    optimizer.register_state_dict_post_hook(functools.partial(note, "after"), prepend=prepend)
    saved = optimizer.state_dict()
    pair = ["before 2", "before 1"] if prepend else ["before 1", "before 2"]
    assert calls == [*pair, "after"]
    assert saved["tag"] == "x"


@pytest.mark.parametrize("prepend", [False, True])
def test_load_hooks_run_in_order_and_may_replace_what_is_loaded(prepend):
    _, optimizer = trained()
    calls = []

    def halved(o, given):
        calls.append("halved")
        groups = [{**group, "lr": group["lr"] / 2} for group in given["param_groups"]]
        return {**given, "param_groups": groups}

    def fixed(o, given):
        calls.append("fixed")
        given["param_groups"] = [{**group, "lr": 1.0} for group in given["param_groups"]]

    optimizer.register_load_state_dict_pre_hook(fixed)
    optimizer.register_load_state_dict_pre_hook(halved, prepend=prepend)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("first"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("second"), prepend=prepend)
    with pytest.warns(UserWarning, match="settings are used"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert calls[:2] == (["halved", "fixed"] if prepend else ["fixed", "halved"])
    assert calls[2:] == (["second", "first"] if prepend else ["first", "second"])
    assert optimizer.param_groups[0]["lr"] == (1.0 if prepend else 0.5)


# --- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_a_group_added_later_trains_and_is_saved(named):
    tensors, optimizer = trained(named=named)
    more = nn.Parameter(torch.eye(3))
    pair = ("more", more) if named else more
    optimizer.add_param_group({"params": pair if not named else [pair], "lr": 0.2})
    step(optimizer, [*tensors, more])
    assert float(optimizer.state[more]["step"]) == 1
    again = build(copy.deepcopy(tensors), named=named)
    with pytest.raises(ValueError, match="checkpoint"):
        again.load_state_dict(optimizer.state_dict())
    again.add_param_group({"params": [pair]})
    with pytest.warns(UserWarning, match=r"lr=0.2 \(not 0.05\)"):
        again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert again.param_groups[-1]["lr"] == 0.2
