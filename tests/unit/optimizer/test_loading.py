"""What a checkpoint must hold to be loaded, what is said, and what stays as it was."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from hf_muon import Muon
from tests.unit.optimizer.test_checkpoint import build, model, through_a_file, train


def trained(steps=1, **settings):
    net = model()
    optimizer = build(net, **settings)
    train(net, optimizer, steps, seed=1)
    return net, optimizer


def everything(net, optimizer):
    """Weights, state and groups, to be compared as one."""
    state = {str(k): v for k, v in optimizer.state_dict()["state"].items()}
    groups = [{**group} for group in optimizer.state_dict()["param_groups"]]
    return copy.deepcopy((net.state_dict(), state, groups))


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def entry(number, **values):
    """Change the state of a parameter: 0 is a matrix (8, 6), 3 an AdamW vector (8)."""
    return lambda saved: saved["state"][number].update(values)


def group(number, **values):
    return lambda saved: saved["param_groups"][number].update(values)


def lost(number, key):
    return lambda saved: saved["state"][number].pop(key)


NAN, INF = float("nan"), float("inf")
DAMAGED = {
    "transposed": (entry(0, exp_avg=torch.zeros(6, 8)), r"0\.weight has shape \(6, 8\).*\(8, 6\)"),
    "longer": (entry(0, exp_avg=torch.zeros(9, 6)), r"0\.weight has shape \(9, 6\)"),
    "flat": (entry(0, exp_avg=torch.zeros(48)), r"0\.weight has shape \(48,\)"),
    "shorter": (entry(3, exp_avg_sq=torch.zeros(4)), r"0\.bias has shape \(4,\).*\(8,\)"),
    "scalar": (entry(3, exp_avg=torch.zeros(())), r"0\.bias has shape \(\)"),
    "integers": (entry(0, exp_avg=torch.zeros(8, 6, dtype=torch.int64)), "int64; a dense one"),
    "complex": (entry(3, exp_avg=torch.zeros(8, dtype=torch.complex64)), "complex64; a dense one"),
    "sparse": (entry(0, exp_avg=torch.zeros(8, 6).to_sparse()), "sparse_coo tensor"),
    "meta": (entry(0, exp_avg=torch.zeros(8, 6, device="meta")), "meta device"),
    "number": (entry(0, exp_avg=1.0), "'exp_avg' in the state of 0.weight is a float"),
    "NaN": (entry(0, exp_avg=torch.full((8, 6), NAN)), r"0\.weight holds NaN or infinity"),
    "infinite": (entry(3, exp_avg_sq=torch.full((8,), INF)), r"0\.bias holds NaN or infinity"),
    "negative": (entry(3, exp_avg_sq=torch.full((8,), -1.0)), "holds -1; an average of squares"),
    "step NaN": (entry(0, step=torch.tensor(NAN)), "'step' in the state of 0.weight is tensor.nan"),
    "step < 0": (entry(3, step=-2), "'step' in the state of 0.bias is -2; a number ≥ 0"),
    "step huge": (entry(3, step=10**400), "'step' in the state of 0.bias is 1000"),
    "steps": (entry(3, step=torch.ones(2)), "'step' in the state of 0.bias is tensor"),
    "step string": (entry(3, step="many"), "is many; a number ≥ 0"),
    "no momentum": (lost(0, "exp_avg"), "state of 0.weight has no 'exp_avg'"),
    "no step": (lost(3, "step"), "state of 0.bias has no 'step'"),
    "no dict": (lambda saved: saved["state"].update({0: [1]}), "0.weight is a list, not a dict"),
    "lr": (group(0, lr=NAN), "Group 0 of the checkpoint.*lr=nan is not finite"),
    "initial lr": (group(0, initial_lr=INF), "initial_lr=inf is not finite"),
    "momentum": (group(0, momentum=2), r"momentum=2\.0 is out of range: 0 ≤ momentum < 1"),
    "decay": (group(0, weight_decay=-5), r"weight_decay=-5\.0 is out of range"),
    "betas": (group(1, betas=(0.9, 2.0)), "Group 1.*adamw_betas=.*out of range"),
    "eps": (group(1, eps="x"), "adamw_eps='x'"),
    "huge": (group(0, polar_steps=10**400), "Group 0 of the checkpoint"),
    "twice": (group(0, params=[0, 0, 2]), "stands twice"),
    "no groups": (lambda saved: saved.pop("param_groups"), "checkpoint is damaged"),
    "no state": (lambda saved: saved.pop("state"), "checkpoint is damaged"),
    "list": (lambda saved: saved.update(param_groups=[1]), "checkpoint is damaged"),
    "names": (group(0, param_names=["0.weight"]), r"1\.weight: absent there"),
    "no names": (group(0, param_names=[1, 2, 3]), "checkpoint is damaged"),
    "matrices": (group(0, matrices=7), "checkpoint is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_does_not_fit_is_refused_and_changes_nothing(damage, message):
    net, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 1, seed=2)
    damage(saved)
    before = everything(net, optimizer)
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(saved)
    assert len(str(caught.value)) < 1000
    assert same(before, everything(net, optimizer))
    train(net, optimizer, 1, seed=3)


def test_what_is_no_dict_is_refused():
    with pytest.raises(TypeError, match="state_dict is a list; a dict is expected"):
        trained()[1].load_state_dict([])


@pytest.mark.parametrize("grown", [(9, 6), (8, 7)])
def test_an_embedding_that_grew_is_refused(grown):
    def optimizer_of(rows, width):
        table, matrix = nn.Parameter(torch.zeros(rows, width)), nn.Parameter(torch.randn(4, 4))
        table.grad, matrix.grad = torch.ones_like(table), torch.ones_like(matrix)
        table = {"params": [("table", table)], "algorithm": "adamw"}
        return Muon([{"params": [("w", matrix)]}, table], lr=0.1)

    small = optimizer_of(8, 6)
    small.step()
    with pytest.raises(ValueError, match=rf"table has shape \(8, 6\).*\({grown[0]}, {grown[1]}\)"):
        optimizer_of(*grown).load_state_dict(small.state_dict())


@pytest.mark.parametrize(
    ("gone", "said"), [([0], "1 of 6"), ([0, 1, 3], "3 of 6"), (range(6), "6 of 6")]
)
def test_missing_state_is_said(gone, said):
    net, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for number in gone:
        del saved["state"][number]
    with pytest.warns(
        UserWarning, match=f"no state for {said} trained parameters: 0.weight"
    ) as caught:
        optimizer.load_state_dict(saved)
    assert caught[0].filename == __file__
    train(net, optimizer, 1, seed=2)


def test_frozen_parameters_have_no_state_and_none_is_missed():
    net = model()
    net[1].requires_grad_(False)
    optimizer = build(net)
    train(net, optimizer, 1, seed=1)
    assert {i for i, p in enumerate(net.parameters()) if p in optimizer.state} == {0, 1, 4, 5}
    saved = through_a_file(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    net[1].requires_grad_(True)
    train(net, optimizer, 1, seed=2)
    assert all(p in optimizer.state for p in net.parameters())
    with pytest.warns(UserWarning, match="no state for 2 of 6"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor([3.0]), torch.tensor(3)])
def test_step_counts_of_any_kind_are_loaded(step):
    net, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = step
    optimizer.load_state_dict(saved)
    counts = [state["step"] for state in optimizer.state.values()]
    assert all(c.shape == () and c.dtype == torch.float32 and int(c) == 3 for c in counts)
    train(net, optimizer, 1, seed=2)
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}


def test_the_step_of_a_matrix_is_loaded_onto_the_cpu():
    matrix = nn.Parameter(torch.zeros(4, 6, device="meta"))
    optimizer = Muon([matrix], lr=0.1)
    buffer = {"step": torch.ones(()), "exp_avg": torch.zeros(4, 6, device="meta")}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: buffer}})
    assert optimizer.state[matrix]["step"].device.type == "cpu"
    older = copy.deepcopy(optimizer.state_dict())
    older["param_groups"][0]["fused"] = True  # would move it, in torch's loader
    optimizer.load_state_dict(older)
    assert optimizer.state[matrix]["step"].device.type == "cpu"
    assert "fused" not in optimizer.param_groups[0]


# --- which values train --------------------------------------------------------------------------


@pytest.mark.parametrize("scheduled", [False, True])
def test_rates_that_were_passed_and_do_not_train_are_said_once(scheduled):
    def build_one(lr, **settings):
        net = model()
        optimizer = build(net, lr=lr, **settings)
        schedule = LambdaLR(optimizer, lambda step: 0.5**step) if scheduled else None
        return net, optimizer, schedule

    net, optimizer, schedule = build_one(0.02, adamw_lr=0.003)
    for _ in range(2):
        train(net, optimizer, 1, seed=1)
        if schedule is not None:
            schedule.step()
    saved = through_a_file(optimizer.state_dict())
    _, again, _ = build_one(0.02, adamw_lr=0.003)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(saved)  # in mid-schedule, but nothing else was asked for
    _, other, _ = build_one(0.05, adamw_lr=0.01, weight_decay=0.2)
    with pytest.warns(UserWarning, match="settings are used") as caught:
        other.load_state_dict(saved)
    assert caught[0].filename == __file__
    assert [str(w.message).partition("'s: ")[2] for w in caught] == [
        "lr=0.02 (not 0.05), weight_decay=0.1 (not 0.2), adamw_lr=0.003 (not 0.01), "
        "adamw_weight_decay=0.1 (not 0.2)"
    ]
    assert other.param_groups[0]["lr"] == saved["param_groups"][0]["lr"]


def test_a_schedule_that_rounded_below_zero_is_loaded():
    optimizer = trained()[1]
    optimizer.param_groups[0].update(initial_lr=0.02, lr=-1e-18)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0
    copy.deepcopy(optimizer)


def test_a_cycled_schedule_resumes_in_silence():
    def build_one():
        net = model()
        optimizer = build(net)
        return net, optimizer, OneCycleLR(optimizer, 0.1, total_steps=9)

    net, optimizer, schedule = build_one()
    for _ in range(4):
        train(net, optimizer, 1, seed=1)
        schedule.step()
    _, again, _ = build_one()
    for other in (again, build(model())):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(through_a_file(optimizer.state_dict()))
        assert other.param_groups[1]["momentum"] == optimizer.param_groups[1]["momentum"] < 0.95


# --- groups that were built otherwise ------------------------------------------------------------


def grown(lr=0.02):
    """Groups of ``build``, the vectors before the last matrix."""
    named = dict(model().named_parameters())
    optimizer = Muon([{"params": [(n, named[n]) for n in ("0.weight", "1.weight")]}], lr=lr)
    vectors = [(n, p) for n, p in named.items() if p.ndim == 1]
    optimizer.add_param_group({"params": vectors, "algorithm": "adamw", "lr": 0.5 * lr})
    optimizer.add_param_group({"params": [("2.weight", named["2.weight"])], "momentum": 0.9})
    for p in named.values():
        p.grad = torch.full_like(p, p.numel())
    optimizer.step()
    return optimizer


def at_once(lr=0.02):
    named = dict(model().named_parameters())
    vectors = [(n, p) for n, p in named.items() if p.ndim == 1]
    return Muon(
        [
            {"params": [(n, named[n]) for n in ("0.weight", "1.weight")]},
            {"params": [("2.weight", named["2.weight"])], "momentum": 0.9},
            {"params": vectors, "algorithm": "adamw", "lr": 0.5 * lr},
        ],
        lr=lr,
    )


def test_a_grown_optimizer_is_loaded_into_one_built_at_once():
    source, target = grown(), at_once()
    with pytest.warns(
        UserWarning, match=r"scheduler goes by position.*\[0.02, 0.02, 0.01\]"
    ) as caught:
        target.load_state_dict(through_a_file(source.state_dict()))
    assert caught[0].filename == __file__
    for group in source.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            same_group = next(g for g in target.param_groups if name in g["param_names"])
            other = same_group["params"][same_group["param_names"].index(name)]
            assert torch.equal(target.state[other]["exp_avg"], source.state[p]["exp_avg"])
            assert same_group["lr"] == group["lr"]
    assert [group["group_id"] for group in target.param_groups] == [0, 1, 2]


def test_matrices_in_other_groups_are_refused():
    with pytest.raises(ValueError, match="same parameters in other groups"):
        build(model()).load_state_dict(grown().state_dict())


def test_names_on_one_side_only():
    def optimizer_of(named, size=2):
        torch.manual_seed(0)
        tensors = [nn.Parameter(torch.randn(4, 4)) for _ in range(size)]
        for p in tensors:
            p.grad = torch.randn(4, 4)
        params = [(f"w{i}", p) for i, p in enumerate(tensors)] if named else tensors
        return Muon(params, lr=0.1), tensors

    for named in (False, True):
        source, of_source = optimizer_of(named)
        source.step()
        target, of_target = optimizer_of(not named)
        target.load_state_dict(through_a_file(source.state_dict()))
        assert target.param_groups[0]["param_names"] == ["w0", "w1"]
        for a, b in zip(of_source, of_target, strict=True):
            assert torch.equal(source.state[a]["exp_avg"], target.state[b]["exp_avg"])
        with pytest.raises(ValueError, match=r"groups of \[2\] parameters and this .* of \[3\]"):
            optimizer_of(not named, size=3)[0].load_state_dict(source.state_dict())


def test_routes_are_compared_without_names_too():
    a, b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    one = Muon([{"params": [a]}, {"params": [b], "algorithm": "adamw"}], lr=0.1)
    other = Muon([{"params": [a]}, {"params": [b]}], lr=0.1)
    with pytest.raises(ValueError, match="tensor 0 of group 1: AdamW there, Muon"):
        other.load_state_dict(one.state_dict())
