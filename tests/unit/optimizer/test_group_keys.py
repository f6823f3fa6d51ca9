"""Parameters and keys of groups as torch's optimizers take and refuse them."""

import pytest
import torch
from torch import nn

from hf_muon import Muon
from tests.unit.optimizer.test_checkpoint import through_a_file


def matrix():
    return nn.Parameter(torch.eye(2))


SAME = matrix()
ERRORS = {
    "one tensor": (lambda: matrix(), TypeError, "params is one tensor"),
    "a set": (lambda: {matrix()}, TypeError, "params is a set"),
    "a set in a group": (lambda: [{"params": {matrix()}}], TypeError, "params is a set"),
    "numbers": (lambda: [1.0, 2.0], TypeError, "One of the params is a float"),
    "strings": (lambda: {"a": matrix()}, TypeError, "One of the params is a str"),
    "no pair": (lambda: [("a", matrix(), 1)], TypeError, "One of the params is a tuple"),
    "mixed groups": (lambda: [{"params": [matrix()]}, matrix()], TypeError, "group is a Param"),
    "nothing": (lambda: [], ValueError, "no matrix to train"),
    "some names": (lambda: [("a", matrix()), matrix()], ValueError, "with/without names"),
    "some groups": (
        lambda: [{"params": [("a", matrix())]}, {"params": [matrix()]}],
        ValueError,
        "with/without names",
    ),
    "twice": (
        lambda: [{"params": [SAME]}, {"params": [SAME]}],
        ValueError,
        "more than one parameter group",
    ),
    "not a leaf": (lambda: [matrix() * 2], ValueError, "non-leaf"),
}


@pytest.mark.parametrize(("params", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        Muon(params(), lr=0.1)


def test_the_same_parameter_twice_in_a_group_warns():
    with pytest.warns(UserWarning, match="duplicate parameters"):
        Muon([SAME, SAME], lr=0.1)


@pytest.mark.parametrize("lr", [torch.tensor([0.1, 0.1]), -0.1, "fast", None, float("nan"), True])
def test_wrong_learning_rates_are_refused(lr):
    with pytest.raises(ValueError, match="lr"):
        Muon([matrix()], lr=lr)


@pytest.mark.parametrize(
    "key", ["maximize", "amsgrad", "capturable", "differentiable", "ns_steps", "dampening"]
)
def test_settings_of_other_optimizers_are_refused_where_they_would_act(key):
    with pytest.raises(ValueError, match=f"'{key}'"):
        Muon([{"params": [matrix()], key: True}], lr=0.1)
    assert Muon([{"params": [matrix()], key: False}], lr=0.1).param_groups[0][key] is False


@pytest.mark.parametrize("key", ["lr_scale", "max_lr", "weight_decay_mult", "name", "foreach"])
def test_keys_of_others_stay_in_a_group(key):
    optimizer = Muon([{"params": [matrix()], key: 0.5}], lr=0.1)
    assert optimizer.param_groups[0][key] == 0.5
    saved = through_a_file(optimizer.state_dict())
    other = Muon([matrix()], lr=0.1)
    other.load_state_dict(saved)
    assert other.param_groups[0][key] == 0.5


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ("muon", "momentun"),
        ("muon", "weigth_decay"),
        ("muon", "polar_step"),
        ("muon", "eps"),
        ("muon", "adamw_lr"),
        ("adamw", "beta"),
        ("adamw", "adamw_betas"),
        ("adamw", "weight_deacy"),
        ("adamw", "nesterov"),
    ],
)
def test_misspelt_settings_are_refused(algorithm, key):
    group = {"params": [matrix()], "algorithm": algorithm, key: 0.5}
    with pytest.raises(ValueError, match=f"algorithm='{algorithm}': '{key}'"):
        Muon([{"params": [matrix()]}, group], lr=0.1)


def test_what_is_no_value_of_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="note of a param group: set is not a type"):
        Muon([{"params": [matrix()], "note": {1}}], lr=0.1)


def test_a_kernel_is_no_stack_and_an_empty_matrix_none():
    kernel = nn.Conv2d(3, 8, 3).weight
    with pytest.raises(ValueError, match=r"shape \(8, 3, 3, 3\).*create_muon_optimizer"):
        Muon([kernel], lr=0.1)
    Muon([{"params": [kernel], "matrices": [((0, (8, 27), (27, 1), 0),)]}], lr=0.1)
    Muon([nn.Parameter(torch.zeros(2, 3, 4))], lr=0.1)
    for shape in ((0, 3), (3, 0), (0, 3, 4)):
        with pytest.raises(ValueError, match=rf"parameter 0 has shape .{shape[0]}, .*no|without"):
            Muon([nn.Parameter(torch.zeros(shape))], lr=0.1)
