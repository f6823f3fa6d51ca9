"""Which parameter groups are taken, refused and changed."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hf_muon import Muon, MuonConfig
from tests.unit.optimizer.test_step import parameter

WRONG_GROUPS = [
    ([{"params": [torch.zeros(5)]}], r"\(5,\), which is not a matrix.*algorithm='adamw'"),
    ([{"params": [torch.zeros(5)], "algorithm": "adamw"}], "no matrix to train"),
    ([{"params": [torch.zeros(4, 4)], "algorithm": "adam"}], "'adam'.*Did you mean 'adamw'"),
    ([{"params": [torch.zeros(4, 4)], "momentun": 0.9}], "'momentun'.*Did you mean 'momentum'"),
    ([{"params": [torch.zeros(4, 4)], "betas": (0.9, 0.9)}], "algorithm='muon': 'betas'"),
    ([{"params": [torch.zeros(4, 4)], "momentum": 1.5}], "momentum=1.5"),
    (
        [
            {"params": [torch.zeros(4, 4)]},
            {"params": [torch.zeros(4)], "algorithm": "adamw", "momentum": (0.9, 0.98)},
        ],
        "momentum of an AdamW group",
    ),
    ([{"parameters": [torch.zeros(4, 4)]}], "no 'params'"),
    ([{"params": [torch.zeros(4, 4)], "matrices": ()}, {"params": [torch.zeros(3)]}], "matrix"),
    (
        [{"params": [("w", torch.zeros(4, 4))], "matrices": (((0, (2, 4), (4, 1), 0),),)}],
        "matrices of w have 8 elements and the parameter has 16",
    ),
    ([], "no matrix to train"),
    ([{"params": [torch.zeros(4, 4, dtype=torch.complex64)]}], "parameter 0 has dtype torch.compl"),
    ([{"params": [torch.zeros(4, 4, dtype=torch.int32)]}], "parameter 0 has dtype torch.int32"),
    (
        [{"params": [torch.zeros(8, 4)], "matrices": (((0, (4, 4), (4, 1), 0),) * 2,)}],
        "without overlap",
    ),
    (
        [{"params": [torch.zeros(4, 4)], "matrices": (((4, (4, 4), (4, 1), 0),),)}],
        "cover it exactly",
    ),
]


@pytest.mark.parametrize(("groups", "message"), WRONG_GROUPS)
def test_wrong_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        Muon(groups, lr=0.1)


def test_an_empty_group_cannot_be_added():
    optimizer = Muon([torch.zeros(4, 4)], lr=0.1)
    with pytest.raises(ValueError, match="group is empty"):
        optimizer.add_param_group({"params": []})


def test_an_unknown_replicate_group_is_refused():
    with pytest.raises(ValueError, match="replicate_group='all': a process group, 'world' or None"):
        Muon([torch.zeros(4, 4)], lr=0.1, replicate_group="all")


def test_lr_is_required():
    with pytest.raises(ValueError, match="lr is not set"):
        Muon([torch.zeros(4, 4)])


def test_sparse_gradients_are_refused_before_anything_is_written():
    matrix, table = parameter(4, 6), nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    groups = [
        {"params": [("w", matrix)]},
        {"params": [("table", table.weight)], "algorithm": "adamw"},
    ]
    kept = matrix.detach().clone()
    with pytest.raises(ValueError, match="gradient of table is sparse"):
        Muon(groups, lr=0.1).step()
    assert torch.equal(matrix, kept)


def test_a_flat_shard_in_a_matrix_group_is_refused():
    # Launchers that shard put a flat piece where the matrix was.
    optimizer = Muon([("w", parameter(4, 6))], lr=0.1)
    optimizer.param_groups[0]["params"][0] = parameter(12)
    with pytest.raises(ValueError, match=r"w is a flat shard.*shape \(12,\).*24 elements"):
        optimizer.step()


def test_bfloat16_weights_warn_once_unless_the_buffer_is_chosen():
    weight = nn.Parameter(torch.randn(4, 6).bfloat16())
    with pytest.warns(UserWarning, match="momentum_dtype='float32'"):
        Muon([weight], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon([weight], lr=0.1, momentum_dtype="float32")
        Muon([weight], lr=0.1, order="polar_only")  # has no buffer


def three_groups():
    torch.manual_seed(0)
    tensors = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(tensors)]
    optimizer = Muon(groups, lr=0.1)
    for p in tensors:
        p.grad = torch.randn_like(p)
    return optimizer, tensors


def test_groups_may_be_taken_away_and_added():
    optimizer, tensors = three_groups()
    del optimizer.param_groups[1]
    optimizer.add_param_group({"params": [tensors[1]], "weight_decay": 0.7})
    before = [p.detach().clone() for p in tensors]
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(tensors, before, strict=True))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2, 0.7]
    copy.deepcopy(optimizer).step()


def test_groups_may_change_places():
    (one, of_one), (other, of_other) = three_groups(), three_groups()
    other.param_groups.reverse()
    one.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(of_one, of_other, strict=True))


def test_a_checkpoint_that_lacks_newer_keys_is_loaded():
    optimizer, _ = three_groups()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["group_id"], group["lora_damping"]
    optimizer.load_state_dict(saved)
    optimizer.step()


def test_settings_are_checked_once_where_groups_add_none(monkeypatch):
    counts = []
    check = MuonConfig.__post_init__
    monkeypatch.setattr(MuonConfig, "__post_init__", lambda self: counts.append(1) or check(self))
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 3))]},
        {"params": [nn.Parameter(torch.ones(3))], "algorithm": "adamw", "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, config=MuonConfig(lr=0.1, weight_decay=0.2))
    assert len(counts) == 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    groups[0]["momentum"] = 0.5
    assert Muon(groups, config=optimizer.config).param_groups[0]["momentum"] == 0.5
    assert len(counts) == 2
    with pytest.raises(ValueError, match="config is given together with lr"):
        Muon(groups, lr=0.1, config=optimizer.config)
