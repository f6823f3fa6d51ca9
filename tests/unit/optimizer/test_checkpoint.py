"""Saving, loading, refusing and importing optimizer state."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_muon import Muon, create_muon_optimizer
from hf_muon.optimizer import import_state


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6))


def train(net, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def build(net, **settings):
    named = list(net.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim == 2]},
        {"params": [(n, p) for n, p in named if p.ndim == 1], "algorithm": "adamw"},
    ]
    return Muon(groups, **{"lr": 0.02, "weight_decay": 0.1, **settings})


def through_a_file(state):
    """What the Trainer does: torch.save, then a load that executes nothing."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("order", ["pre_polar", "post_polar", "polar_only"])
def test_resume_is_bitwise(order):
    net = model()
    optimizer = build(net, order=order)
    train(net, optimizer, 3, seed=1)
    saved, weights = through_a_file(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    train(net, optimizer, 3, seed=2)
    resumed, fresh = model(), model()
    for other in (resumed, fresh):
        other.load_state_dict(weights)
        continued = build(other, order=order)
        if other is resumed:
            continued.load_state_dict(saved)
        train(other, continued, 3, seed=2)
    for a, b, c in zip(net.parameters(), resumed.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
        # polar_only has no state in its matrices; AdamW's vectors always do.
        assert not torch.equal(a, c) or (order == "polar_only" and a.ndim == 2)


def test_momentum_keeps_its_own_dtype():
    weight = nn.Parameter(torch.randn(4, 6).bfloat16())
    weight.grad = torch.randn(4, 6).bfloat16()
    optimizer = Muon([weight], lr=0.1, momentum_dtype="float32")
    optimizer.step()
    buffer = optimizer.state[weight]["exp_avg"].clone()
    assert buffer.dtype == torch.float32
    assert not torch.equal(buffer, buffer.bfloat16().float())  # bfloat16 would lose something
    other = Muon([weight], lr=0.1, momentum_dtype="float32")
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert torch.equal(other.state[weight]["exp_avg"], buffer)


def test_loaded_state_shares_nothing_with_its_source():
    net = model()
    optimizer = build(net)
    train(net, optimizer, 2, seed=1)
    other = copy.deepcopy(net)
    resumed = build(other)
    resumed.load_state_dict(optimizer.state_dict())
    train(net, optimizer, 1, seed=2)
    assert {int(resumed.state[p]["step"]) for p in other.parameters()} == {2}


def test_another_routing_is_refused_by_name():
    net = model()
    saved = build(net).state_dict()
    names = [n for n, _ in net.named_parameters()]
    parameters = dict(net.named_parameters())
    groups = [
        {"params": [(n, parameters[n]) for n in ("0.weight", "1.weight")]},
        {
            "params": [(n, parameters[n]) for n in names if n not in ("0.weight", "1.weight")],
            "algorithm": "adamw",
        },
    ]
    with pytest.raises(ValueError, match=r"2\.weight: Muon \(1 matrix\) there, AdamW here"):
        Muon(groups, lr=0.1).load_state_dict(saved)


def test_another_split_of_a_parameter_is_refused():
    weight = nn.Parameter(torch.randn(8, 6))
    halves = (((0, (4, 6), (6, 1), 0), (24, (4, 6), (6, 1), 0)),)
    saved = Muon([{"params": [("w", weight)]}], lr=0.1).state_dict()
    split = Muon([{"params": [("w", weight)], "matrices": halves}], lr=0.1)
    with pytest.raises(ValueError, match=r"w: Muon \(1 matrix\) there, Muon \(2 matrices\) here"):
        split.load_state_dict(saved)


def test_another_order_is_refused():
    net = model()
    saved = build(net, order="pre_polar").state_dict()
    with pytest.raises(ValueError, match=r"order='pre_polar'.*order='post_polar'"):
        build(net, order="post_polar").load_state_dict(saved)


def test_other_settings_of_the_checkpoint_are_used_and_named():
    net = model()
    saved = build(net, nesterov=False).state_dict()
    optimizer = build(net, nesterov=True)
    with pytest.warns(UserWarning, match=r"nesterov=False \(not True\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["nesterov"] is False


def test_another_momentum_of_the_checkpoint_is_used_and_named():
    net = model()
    saved = build(net, momentum=0.9).state_dict()
    with pytest.warns(
        UserWarning, match=r"differ from this optimizer's: momentum=0.9 \(not 0.95\)$"
    ):
        build(net).load_state_dict(saved)


def test_the_same_names_in_another_order_are_refused():
    a, b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    saved = Muon([("a", a), ("b", b)], lr=0.1).state_dict()
    with pytest.raises(ValueError, match="loaded by position"):
        Muon([("b", b), ("a", a)], lr=0.1).load_state_dict(saved)


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.Muon])
def test_the_state_of_another_optimizer_is_refused_with_what_to_do(other):
    weight = nn.Parameter(torch.randn(4, 4))
    saved = other([weight], lr=0.1).state_dict()
    with pytest.raises(ValueError, match=r"another optimizer.*optimizer\.pt.*import_state"):
        Muon([weight], lr=0.1).load_state_dict(saved)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("momentum_dtype", [None, "float64"])
def test_distributed_checkpoint_functions_in_one_process(flatten, momentum_dtype):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net = model()
    optimizer = build(net, momentum_dtype=momentum_dtype)
    train(net, optimizer, 3, seed=1)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    other = copy.deepcopy(net)
    resumed = build(other, momentum_dtype=momentum_dtype)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)  # making state to load into changes no weight
    train(net, optimizer, 3, seed=2)
    train(other, resumed, 3, seed=2)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedules_go_on_after_a_reload():
    net = model()
    optimizer = build(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        train(net, optimizer, 1, seed=1)
        schedule.step()
    again = build(net)
    resumed = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 0.5**step)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    resumed.load_state_dict(schedule.state_dict())
    resumed.step()
    assert again.param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**3)


def test_loading_its_own_state_warns_of_nothing():
    optimizer = build(model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def test_copies_and_pickles_work():
    net = model()
    optimizer = build(net)
    train(net, optimizer, 1, seed=1)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        more = nn.Parameter(torch.randn(3, 3))
        more.grad = torch.randn(3, 3)
        kept = more.detach().clone()
        other.add_param_group({"params": [("more", more)]})
        assert other.param_groups[-1]["momentum"] == 0.95
        other.step()
        assert not torch.equal(more, kept)


# --- other optimizers ---------------------------------------------------------------------------


def matrices_of(net):
    return [(name, p) for name, p in net.named_parameters() if p.ndim == 2]


def test_import_from_torch_muon_continues_its_momentum():
    net = model()
    theirs = torch.optim.Muon(matrices_of(net), lr=0.02)
    train(net, theirs, 3, seed=1)
    ours = build(net)
    loaded = import_state(ours, through_a_file(theirs.state_dict()))
    assert loaded == ["0.weight", "1.weight", "2.weight"]
    for _, p in matrices_of(net):
        assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["momentum_buffer"])
    train(net, ours, 1, seed=2)


def moonlight_state(net, momentum=0.95):
    """The state dict that Moonlight's optimizer would have after three steps of given gradients.

    Its matrices sum gradients, M ← βM + G, and its AdamW keeps ``moment1``, ``moment2``, ``step``.
    """
    state, average = {}, {}
    parameters = [*matrices_of(net), *((n, p) for n, p in net.named_parameters() if p.ndim == 1)]
    for index, (name, p) in enumerate(parameters):
        gradients = [torch.randn_like(p) for _ in range(3)]
        if p.ndim == 2:
            total, mean = torch.zeros_like(p), torch.zeros_like(p)
            for g in gradients:
                total = momentum * total + g
                mean = momentum * mean + (1 - momentum) * g
            state[index] = {"use_muon": True, "momentum_buffer": total.detach()}
            average[name] = mean.detach()
        else:
            moments = {"moment1": torch.ones_like(p), "moment2": 2 * torch.ones_like(p)}
            state[index] = {"use_muon": False, "step": 3, **moments}
    group = {"params": list(state), "momentum": momentum, "adamw_betas": (0.9, 0.95), "wd": 0.1}
    return {"state": state, "param_groups": [group]}, [name for name, _ in parameters], average


def test_import_from_moonlight_turns_sums_into_averages():
    net = model()
    state, names, average = moonlight_state(net)
    ours = build(net)
    assert import_state(ours, state, names) == names
    for name, p in net.named_parameters():
        if name in average:
            # One product by 0.05 in float32.
            assert torch.allclose(ours.state[p]["exp_avg"], average[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(ours.state[p]["exp_avg_sq"], 2 * torch.ones_like(p))
            assert int(ours.state[p]["step"]) == 3


def test_import_refuses_what_it_cannot_match():
    net = model()
    state, names, _ = moonlight_state(net)
    with pytest.raises(ValueError, match=r"pass names"):
        import_state(build(net), state)
    with pytest.raises(ValueError, match="5 names are given for 6"):
        import_state(build(net), state, names[:-1])
    with pytest.raises(ValueError, match="'elsewhere', which this optimizer does not train"):
        import_state(build(net), state, ["elsewhere", *names[1:]])
    with pytest.raises(ValueError, match="has shape"):
        import_state(build(net), state, [names[1], names[0], *names[2:]])
    with pytest.raises(ValueError, match="no names to match by"):
        import_state(Muon([p for _, p in matrices_of(net)], lr=0.1), state, names)
    with pytest.raises(ValueError, match="'momentum_buffer'"):
        import_state(
            build(net),
            torch.optim.AdamW(net.parameters()).state_dict()
            | {"state": {0: {"exp_avg": torch.zeros(1)}}},
            names,
        )


@pytest.mark.parametrize("order", ["post_polar", "polar_only"])
def test_import_into_an_order_that_keeps_something_else_is_refused(order):
    net = model()
    state, names, _ = moonlight_state(net)
    with pytest.raises(ValueError, match=f"order='{order}'.* cannot continue"):
        import_state(build(net, order=order), state, names)


def test_create_muon_optimizer_resumes_itself():
    net = model()
    optimizer = create_muon_optimizer(net, lr=0.01)
    train(net, optimizer, 2, seed=1)
    again = create_muon_optimizer(net, lr=0.01)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
