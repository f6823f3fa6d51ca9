"""The plan: groups, decay, fingerprint, table, and models inside wrappers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Trainer
from zoo import ZOO

from hf_muon.config import MuonConfig
from hf_muon.distributed.layout import Matrix
from hf_muon.routing import Route, RoutePlan, route

CONFIG = MuonConfig(lr=0.02, weight_decay=0.1)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return ZOO["llama"].build()


def test_groups_are_muon_then_adamw_decayed_then_not(llama):
    groups = route(llama).param_groups(CONFIG)
    assert [(g["algorithm"], g["weight_decay"]) for g in groups] == [
        ("muon", 0.1),
        ("adamw", 0.1),
        ("adamw", 0.0),
    ]
    named = dict(llama.named_parameters())
    assert all(named[name] is parameter for g in groups for name, parameter in g["params"])
    assert sum(len(g["params"]) for g in groups) == len(named)


def test_groups_carry_their_matrices_through_a_safe_load():
    groups = route(ZOO["gpt_oss"].build()).param_groups(CONFIG)
    muon = groups[0]
    assert len(muon["matrices"]) == len(muon["params"])
    buffer = io.BytesIO()
    torch.save({k: v for g in groups for k, v in g.items() if k != "params"}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["matrices"] == muon["matrices"]
    by_name = dict(zip((name for name, _ in muon["params"]), muon["matrices"], strict=True))
    stack = by_name["model.layers.0.mlp.experts.gate_up_proj"]
    assert stack[1] == (32 * 96, (32, 96), (96, 1), 1)
    assert not any(isinstance(m, Matrix) for matrices in muon["matrices"] for m in matrices)


@pytest.mark.parametrize("name", ZOO)
def test_the_decay_split_is_the_trainers_own(name):
    model = ZOO[name].build()
    decayed = Trainer.get_decay_parameter_names(None, model)
    expected = {n: n in decayed for n, p in model.named_parameters() if p.requires_grad}
    assert {r.name: r.decay for r in route(model).routes} == expected


def test_a_matrix_that_is_not_decayed_gets_a_group_of_its_own():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Linear(8, 8, bias=False)
            self.linear = nn.Linear(8, 8, bias=False)

    groups = route(Normed()).param_groups(CONFIG)
    assert [(g["algorithm"], g["weight_decay"], g["params"][0][0]) for g in groups] == [
        ("muon", 0.1, "linear.weight"),
        ("muon", 0.0, "norm.weight"),
    ]


def test_names_are_clean_of_wrappers_and_of_nothing_else(llama):
    plan = route(llama)
    wrapped = route(nn.DataParallel(torch.compile(llama)))
    assert wrapped.to_dict() == plan.to_dict()
    llama.model.layers[0] = torch.compile(llama.model.layers[0])
    try:
        assert route(llama).fingerprint == plan.fingerprint
    finally:
        llama.model.layers[0] = llama.model.layers[0]._orig_mod

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(8, 8, bias=False)

    assert [r.name for r in route(Own()).routes] == ["module.weight"]


def test_a_wrapped_model_gets_the_same_groups(llama):
    inside, outside = (route(m).param_groups(CONFIG) for m in (llama, nn.DataParallel(llama)))
    for one, other in zip(inside, outside, strict=True):
        assert [n for n, _ in one["params"]] == [n for n, _ in other["params"]]


def test_shapes_under_zero_3_come_from_deepspeed():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    weight = model[0].weight
    shape = weight.shape
    weight.data = torch.empty(0)
    weight.ds_shape = shape
    assert route(model).routes[0].matrices == (Matrix.whole((4, 8)),)


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """A process group that pretends to be one of four ranks; nothing is sent."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_fsdp_2_changes_neither_shapes_nor_classes(four_ranks, name):
    split = MuonConfig(split_fused=True)
    plan = route(ZOO[name].build(), split)
    model = ZOO[name].build()
    mesh = DeviceMesh("cpu", [0, 1, 2, 3])
    for module in [m for m in model.modules() if "Attention" in type(m).__name__]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = route(model, split)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters)
    assert sharded.to_dict() == plan.to_dict()


def test_groups_are_split_by_device_mesh(four_ranks):
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    for index, ranks in enumerate(([0, 1], [0, 1], [0, 1, 2, 3])):
        mesh = DeviceMesh("cpu", ranks)
        tensor = distribute_tensor(model[index].weight.detach(), mesh, [Replicate()])
        model[index].weight = nn.Parameter(tensor)
    groups = route(model).param_groups(CONFIG)
    assert [[name for name, _ in g["params"]] for g in groups] == [
        ["0.weight", "1.weight"],
        ["2.weight"],
        ["3.weight"],
    ]


def test_the_fingerprint_tells_routings_apart(llama):
    one = route(llama).fingerprint
    assert one == route(ZOO["llama"].build()).fingerprint
    assert len(one) == 16
    assert one != route(llama, MuonConfig(adamw_params=("q_proj",))).fingerprint
    phi3 = ZOO["phi3"].build()
    assert route(phi3).fingerprint != route(phi3, MuonConfig(split_fused=True)).fingerprint


def test_the_table_names_every_parameter_and_reason(llama):
    plan = route(llama)
    table = plan.table()
    assert all(r.name in table and r.reason in table for r in plan.routes)
    assert "14 matrices" in table
    compact = plan.table(compact=True)
    assert "model.layers.*.self_attn.q_proj.weight  (2 times)" in compact
    assert len(compact.splitlines()) < len(table.splitlines())


def test_unknown_parameters_are_named_prominently():
    table = route(ZOO["mamba"].build()).table()
    tail = table[table.index("UNKNOWN: 2 parameter(s)") :]
    assert "backbone.layers.*.mixer.A_log 64 × 4" in tail
    assert "UNKNOWN" not in route(ZOO["llama"].build()).table()


def test_the_plan_exports_to_json(llama):
    plan = route(llama)
    loaded = json.loads(json.dumps(plan.to_dict()))
    assert loaded["fingerprint"] == plan.fingerprint
    assert loaded["totals"]["muon_matrices"] == 14
    assert loaded["routes"][1]["matrices"] == [[0, [32, 32], [32, 1], 0]]


def test_nothing_for_muon_is_an_error_that_says_why(llama):
    plan = route(nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4)))
    assert "AdamW: 40 parameters" in plan.table()
    with pytest.raises(ValueError, match=r"all 3 trainable .* went to AdamW \(embedding, vector\)"):
        plan.param_groups(CONFIG)
    frozen = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(ValueError, match="all 2 parameters are frozen"):
        route(frozen).param_groups(CONFIG)


def test_flat_parameters_of_fsdp_1_are_refused():
    class FullyShardedDataParallel(nn.Module):  # what matters is the class's name
        def __init__(self) -> None:
            super().__init__()
            self._fsdp_wrapped_module = nn.Linear(4, 4)
            self._fsdp_wrapped_module.weight = nn.Parameter(torch.zeros(16))

    plan = route(FullyShardedDataParallel())
    assert plan.routes[0].name == "weight"
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        plan.param_groups(CONFIG)


def test_routes_and_plans_are_plain_and_comparable(llama):
    assert route(llama) == route(llama)
    assert Route("w", (2, 2), "adamw", "x: y").kind == "x"
    assert RoutePlan(()).totals()["muon_matrices"] == 0


def test_a_parameter_without_a_storage_is_routed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.eye(4).to_sparse())
    assert "0.weight" in {r.name for r in route(model).routes}
