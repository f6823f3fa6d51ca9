"""What DeepSpeed's checkpoint loaders do to groups and states is undone."""

import copy

import pytest
import torch
from torch import nn

from hf_muon import Muon
from hf_muon.optimizer.launcher import complete_state, settings_of, with_own_settings


def build(order="pre_polar", matrices=("q", "k"), **settings):
    shapes = {"q": (4, 6), "k": (6, 4), "embedding": (8, 4), "norm": (4,)}
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}

    def pick(names):
        return [(name, named[name]) for name in names]

    rest = [name for name in ("q", "k", "embedding") if name not in matrices]
    groups = [
        {"params": pick(matrices)},
        {"params": pick(rest), "algorithm": "adamw", "lr": 0.02, "weight_decay": 0.3},
        {"params": pick(["norm"]), "algorithm": "adamw", "lr": 0.04, "weight_decay": 0.0},
    ]
    return Muon(groups, **{"lr": 0.1, "weight_decay": 0.2, "order": order, **settings})


def load_as_stage_3(optimizer, saved):
    """What DeepSpeed's universal loader does there: the first group's settings for all groups."""
    first = copy.deepcopy(saved.state_dict()["param_groups"][0])
    for group in optimizer.param_groups:
        group.update({key: value for key, value in first.items() if key != "params"})


def load_as_stage_2(optimizer, saved):
    """And there: each group's for each group."""
    loaded = copy.deepcopy(saved.state_dict()["param_groups"])
    for group, own in zip(optimizer.param_groups, loaded, strict=True):
        group.update({key: value for key, value in own.items() if key != "params"})


def own_settings(optimizer):
    return [settings_of(group) for group in optimizer.param_groups]


@pytest.mark.parametrize("load", [load_as_stage_2, load_as_stage_3])
def test_each_group_keeps_its_own_settings(load):
    optimizer = build()
    before = copy.deepcopy(own_settings(optimizer))
    load(optimizer, build())
    assert (own_settings(optimizer) == before) is (load is load_as_stage_2)
    again = with_own_settings(optimizer.param_groups, optimizer._settings)
    assert own_settings(optimizer) == before == again


def test_scheduled_learning_rates_keep_their_ratios():
    saved, optimizer = build(), build()
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 - step / 4)
        for one in (saved, optimizer)
    ]
    saved._opt_called = True
    schedules[0].step()
    load_as_stage_3(optimizer, saved)
    with_own_settings(optimizer.param_groups, optimizer._settings)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.075, 0.015, 0.03])
    starts = [group["initial_lr"] for group in optimizer.param_groups]
    assert starts == pytest.approx([0.1, 0.02, 0.04])


def test_a_rate_of_zero_at_the_start_of_a_warm_up_loses_no_group():
    saved, optimizer = build(), build()
    for group in saved.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    load_as_stage_3(optimizer, saved)
    with_own_settings(optimizer.param_groups, optimizer._settings)
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0, 0]
    starts = [group["initial_lr"] for group in optimizer.param_groups]
    assert starts == pytest.approx([0.1, 0.02, 0.04])


def test_one_group_at_a_time_is_left_as_it_is():
    optimizer = build()
    before = optimizer._settings
    for group in optimizer.param_groups:
        assert with_own_settings([group], before) is before


@pytest.mark.parametrize("load", [load_as_stage_2, load_as_stage_3])
def test_other_routes_are_refused_by_name(load):
    optimizer = build(matrices=("q", "embedding"))
    load(optimizer, build())
    message = r"k: Muon \(1 matrix\) there, AdamW here"
    with pytest.raises(ValueError, match=message):
        with_own_settings(optimizer.param_groups, optimizer._settings)
    with pytest.raises(ValueError, match=message):  # also where groups step one by one
        with_own_settings(optimizer.param_groups[:1], optimizer._settings)


def test_another_order_is_refused():
    optimizer = build(order="post_polar")
    load_as_stage_3(optimizer, build())
    with pytest.raises(ValueError, match=r"order='pre_polar'.*order='post_polar'"):
        with_own_settings(optimizer.param_groups, optimizer._settings)


@pytest.mark.parametrize("load", [load_as_stage_2, load_as_stage_3])
def test_settings_out_of_range_are_refused(load):
    optimizer, saved = build(), build()
    saved.param_groups[0]["momentum"] = 2.0
    load(optimizer, saved)
    with pytest.raises(ValueError, match=r"A group of the .*momentum=2\.0 is out of range"):
        with_own_settings(optimizer.param_groups, optimizer._settings)


def test_what_an_ordinary_load_changed_is_not_reported_twice(recwarn):
    optimizer = build(nesterov=False)
    with pytest.warns(UserWarning, match="nesterov=True"):
        optimizer.load_state_dict(build().state_dict())
    with_own_settings(optimizer.param_groups, optimizer._settings)
    assert not recwarn.list


def state(flat):
    return {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(flat)}


def memory(tensor):
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("order", "unused"),
    [
        ("pre_polar", ["exp_avg_sq"]),
        ("post_polar", ["exp_avg_sq"]),
        ("polar_only", ["exp_avg", "exp_avg_sq"]),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_what_muon_has_no_use_for_takes_no_memory(order, unused, loaded):
    flat = torch.randn(100)
    group = build(order).param_groups[0]
    full = {"step": torch.tensor(3.0)}
    for name in ("exp_avg", "exp_avg_sq"):
        if loaded or name not in unused:  # universal checkpoints are loaded into whole tensors
            full[name] = torch.zeros(100)
    complete_state(group, full, flat)
    assert full.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name in ("exp_avg", "exp_avg_sq"):
        assert full[name].shape == flat.shape
        assert memory(full[name]) == (4 if name in unused else 400)


def test_step_counts_of_their_own():
    shared, groups = torch.tensor(3.0), build().param_groups
    states = [
        {"step": shared, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)} for _ in groups
    ]
    for group, own in zip(groups, states, strict=True):
        complete_state(group, own, torch.zeros(4))
    assert [float(own["step"]) for own in states] == [3, 3, 3]
    assert len({id(own["step"]) for own in [*states, {"step": shared}]}) == 4


@pytest.mark.parametrize(("number", "device"), [(0, "cpu"), (1, "meta")])
def test_matrices_count_on_the_cpu_and_adamw_where_its_kernel_does(number, device):
    group = build().param_groups[number]
    flat = torch.empty(4, device="meta")
    own = {"step": torch.tensor(3.0, device=device), "exp_avg": flat, "exp_avg_sq": flat}
    before = own["step"]
    complete_state(group, own, flat)
    assert own["step"].device.type == device
    assert own["step"] is not before
