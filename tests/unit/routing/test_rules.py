"""The rules on models outside transformers, and what a user can override."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import ZOO

from hf_muon.config import MuonConfig
from hf_muon.routing import RoutePlan, route


def kinds(model: nn.Module, **config: object) -> dict[str, str]:
    return {r.name: r.kind for r in route(model, MuonConfig(**config)).routes}


def muon_names(plan: RoutePlan) -> set[str]:
    return {r.name for r in plan.muon}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.gate = nn.Linear(32, 4)
        self.gate_proj = nn.Linear(32, 32)
        self.to_vocabulary_size = nn.Linear(32, 128)


class Plain(nn.Module):
    """A language model of someone's own, with nothing of transformers in it."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.head_first = nn.Linear(32, 128, bias=False)
        self.tokens = nn.Embedding(128, 32)
        self.positions = nn.Parameter(torch.zeros(64, 32))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.middle = nn.Linear(32, 32)
        if tied:
            self.head_first.weight = self.tokens.weight


def test_a_model_of_ones_own():
    found = kinds(Plain())
    assert found["head_first.weight"] == "head"  # as many rows as the embedding
    assert found["tokens.weight"] == "embedding"
    assert found["positions"] == "unknown"
    assert found["blocks.0.gate.weight"] == "router"
    assert found["blocks.0.gate_proj.weight"] == "linear"
    assert found["blocks.0.to_vocabulary_size.weight"] == "linear"  # inside a repeated block
    assert found["middle.weight"] == "linear"


def test_a_tied_head_registered_first_is_still_the_embedding():
    found = kinds(Plain(tied=True))
    assert found["head_first.weight"] == "embedding"
    assert "tokens.weight" not in found


def test_torch_transformer():
    model = nn.Transformer(32, 4, 1, 1, 48)
    plan = route(model)
    assert len(plan.muon) == 10  # three attentions of two matrices, two MLPs of two
    assert {r.name.rpartition(".")[2] for r in plan.muon} == {"in_proj_weight", "weight"}
    assert {r.kind for r in plan.adamw} == {"vector"}


def test_attention_with_separate_key_and_value_sizes():
    plan = route(nn.Sequential(nn.MultiheadAttention(32, 4, kdim=16, vdim=24)))
    assert [r.shape for r in plan.muon] == [(32, 32), (32, 16), (32, 24), (32, 32)]


class TopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))


class SharedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 32, 48))
        self.up_bias = nn.Parameter(torch.zeros(4, 48))


def test_a_router_class_takes_everything_below_it():
    found = kinds(nn.Sequential(TopKRouter()))
    assert found["0.score.0.weight"] == found["0.score.1.weight"] == "router"


def test_experts_without_a_declared_orientation_leave_it_open():
    plan = route(nn.Sequential(SharedExperts()))
    routes = {r.name: r for r in plan.routes}
    assert [m.shape for m in routes["0.up"].matrices] == [(32, 48)] * 4
    assert {m.fan_out_dim for m in routes["0.up"].matrices} == {None}
    assert routes["0.up_bias"].kind == "bias stack"


def test_parametrized_and_old_style_normed_weights_go_to_adamw():
    linear = torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 16))
    plan = route(nn.Sequential(linear, nn.Linear(16, 8)))
    assert muon_names(plan) == {"1.weight"}


def test_a_head_of_ones_own_beside_a_backbone_of_transformers():
    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = ZOO["bert"].build()
            self.score = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 5))
            self.projector = nn.Linear(32, 32)

    found = kinds(Regressor())
    assert found["score.0.weight"] == found["score.1.weight"] == "head"
    assert found["encoder.cls.predictions.transform.dense.weight"] == "head"
    assert found["projector.weight"] == "linear"
    assert found["encoder.bert.encoder.layer.0.output.dense.weight"] == "linear"


def test_frozen_parameters_have_no_route():
    model = Plain()
    model.blocks.requires_grad_(False)
    plan = route(model)
    assert not any("blocks" in r.name for r in plan.routes)
    assert plan.frozen == 20


def test_the_user_is_asked_first():
    plan = route(Plain(), MuonConfig(muon_params=("positions",), adamw_params=(r"up\.weight$",)))
    reasons = {r.name: r.reason for r in plan.routes}
    assert reasons["positions"] == "user: muon_params 'positions'"
    assert reasons["blocks.1.up.weight"] == "user: adamw_params 'up\\\\.weight$'"
    assert "positions" in muon_names(plan)


def test_an_adamw_pattern_excepts_from_a_muon_pattern():
    settings = MuonConfig(muon_params=("positions|middle",), adamw_params=(r"middle\.bias",))
    assert {"positions", "middle.weight"} <= muon_names(route(Plain(), settings))


@pytest.mark.parametrize(
    ("layer", "shapes", "fan_out"),
    [
        (nn.Conv2d(3, 8, 5), [(8, 75)], 0),
        (nn.Conv1d(4, 6, 3, groups=2), [(3, 6)] * 2, 0),
        (nn.ConvTranspose2d(4, 6, 3), [(4, 54)], 1),
    ],
)
def test_a_kernel_is_flattened_on_request_only(layer, shapes, fan_out):
    model = nn.Sequential(layer, nn.Linear(8, 8))
    assert kinds(model)["0.weight"] == "conv"
    found = route(model, MuonConfig(muon_params=(r"0\.weight",))).routes[0]
    assert [m.shape for m in found.matrices] == shapes
    assert {m.fan_out_dim for m in found.matrices} == {fan_out}
    assert sum(m.numel for m in found.matrices) == found.numel


def test_forcing_muon_on_a_linear_head_keeps_its_orientation():
    found = {
        r.name: r for r in route(ZOO["llama"].build(), MuonConfig(muon_params=("lm_head",))).muon
    }
    assert found["lm_head.weight"].matrices[0].fan_out_dim == 0


ERRORS = {
    "a vector": ({"muon_params": ("norm",)}, r"shape \(32,\) and holds no matrix"),
    "a misspelled name": ({"adamw_params": ("lm_hed",)}, r"adamw_params holds 'lm_hed'.*lm_head"),
    "no match at all": ({"muon_params": ("zzzz",)}, r"muon_params holds 'zzzz', which matches no"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_patterns_that_cannot_be_followed_are_errors(case):
    settings, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        route(ZOO["llama"].build(), MuonConfig(**settings))


def test_a_depthwise_kernel_holds_no_matrix():
    model = nn.Sequential(nn.Conv1d(8, 8, 3, groups=8))
    with pytest.raises(ValueError, match="holds no matrix"):
        route(model, MuonConfig(muon_params=(r"0\.weight",)))


def test_a_bad_regex_is_an_error():
    with pytest.raises(ValueError, match=r"adamw_params holds '\(', which is not a regular"):
        route(Plain(), MuonConfig(adamw_params=("(",)))


def test_a_pattern_on_a_tied_head_names_the_tensor():
    with pytest.raises(ValueError, match=r"lm_head.weight is tied: .* transformer.wte.weight"):
        route(ZOO["gpt2"].build(), MuonConfig(muon_params=("lm_head",)))
