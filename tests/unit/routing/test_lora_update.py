"""Which LoRA factors move as pairs, which do not and why, and the groups that follow."""

from __future__ import annotations

import logging
import math

import peft
import pytest
import torch
import transformers
from adapted import NOT_FACTORS, adapted, lora, with_experts, with_two_adapters
from zoo import SIZES, built

from hf_muon import Muon, create_muon_optimizer
from hf_muon.config import MuonConfig
from hf_muon.integrations.factory import MuonOptimizerFactory
from hf_muon.routing import route

PRODUCT = MuonConfig(lora_update="product", lr=0.1)


def test_pairs_move_together_in_a_group_of_their_own():
    model = adapted(lora(modules_to_save=["lm_head"]))
    plan = route(model, PRODUCT)
    assert {r.lora_update for r in plan.muon} == {"product"}
    assert {r.lora_update for r in plan.adamw} == {None}
    muon, adamw = plan.param_groups(PRODUCT)
    assert (muon["lora_update"], muon["lora_damping"]) == ("product", 1e-2)
    assert muon["factors"] == ("A", "B") * 2
    assert muon["scalings"] == (2.0,) * 4
    assert "lora_update" not in adamw
    assert Muon(plan.param_groups(PRODUCT), lr=0.1).param_groups[0]["lora_update"] == "product"


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_update": "product"},
        {"lr_multipliers": ("layers.0:0.1",)},
        {"adamw_params": ("down_proj",)},
        {"conv": "flatten"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_plan_is_not_for_settings_that_ask_for_other_routes(settings):
    (name,) = settings
    model = adapted(lora())
    plan, config = route(model), MuonConfig(lr=0.1, **settings)
    with pytest.raises(ValueError, match=rf"{name}=.* is set, and the plan was made with"):
        plan.param_groups(config)
    with pytest.raises(ValueError, match=rf"route\(model, MuonConfig\({name}="):
        MuonOptimizerFactory(list(model.parameters()), lr=0.1, plan=plan, **settings)
    plan.param_groups(MuonConfig(lr=0.2, order="post_polar", weight_decay=0.1))
    other = route(model, MuonConfig(**settings))
    expected = other.param_groups(config)
    for more in (settings, {}):  # what the plan was made with need not be repeated
        optimizer = MuonOptimizerFactory(list(model.parameters()), lr=0.1, plan=other, **more)
        assert getattr(optimizer.config, name) == getattr(config, name)
        assert [g["param_names"] for g in optimizer.param_groups] == [
            [name for name, _ in group["params"]] for group in expected
        ]
        assert [g.get("lora_update") for g in optimizer.param_groups] == [
            group.get("lora_update") for group in expected
        ]


def test_by_default_every_factor_is_on_its_own_and_reasons_are_short():
    plan = route(adapted(lora()))
    assert {r.lora_update for r in plan.muon} == {"factor"}
    assert {r.factor: r.reason for r in plan.muon} == {
        "A": "adapter: LoRA factor A", "B": "adapter: LoRA factor B",
    }  # fmt: skip
    (group,) = plan.param_groups(MuonConfig(lr=0.1))
    assert group["lora_update"] == "factor"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_every_expert_is_a_pair(name):
    optimizer = create_muon_optimizer(with_experts(name), PRODUCT)
    (group,) = optimizer.param_groups
    assert group["lora_update"] == "product"
    assert {len(inside) for inside in group["matrices"]} == {4}


def test_step_sizes_that_cannot_be_known_are_refused_at_construction():
    with pytest.raises(ValueError, match="fan_out"):
        create_muon_optimizer(with_experts("llama4_text"), PRODUCT, adjust_lr="spectral")
    model = adapted(lora(lora_alpha=0))
    with pytest.raises(ValueError, match="scaling 0"):
        create_muon_optimizer(model, PRODUCT)
    create_muon_optimizer(model, lr=0.1)


def test_dora_and_single_factors_fall_back_with_a_reason_and_a_log(caplog):
    model = with_two_adapters(["default", "second"])
    model.set_requires_grad(["default", "second"])
    for name, p in model.named_parameters():
        if "q_proj.lora_A.second" in name:
            p.requires_grad_(False)
    plan = route(model, PRODUCT)
    single = {r.name: r for r in plan.muon if r.lora_update == "factor"}
    assert [name.partition("lora_")[2] for name in single] == ["B.second.weight"]
    (one,) = single.values()
    assert one.reason == (
        "adapter: LoRA factor B, lora_update='factor' because Muon does not train its partner"
    )
    assert one.reason in plan.table()
    with caplog.at_level(logging.WARNING, logger="hf_muon"):
        groups = plan.param_groups(PRODUCT)
    assert [g["lora_update"] for g in groups] == ["factor", "product"]
    assert "pairs" not in groups[0]
    assert "1 LoRA factors are updated one by one" in caplog.text

    others = {"DoRA normalizes W + cBA": {"use_dora": True}}
    others["KaSA has a trained diagonal between B and A"] = {"kasa_config": peft.KasaConfig()}
    for reason, settings in others.items():
        plan = route(adapted(lora(**settings)), PRODUCT)
        factors = [r for r in plan.muon if r.factor]
        assert {r.lora_update for r in factors} == {"factor"}
        assert all(f"because {reason}" in r.reason and r.pair for r in factors)


def test_a_factor_that_the_user_sends_to_adamw_leaves_its_partner_on_its_own():
    config = MuonConfig(lora_update="tangent", lr=0.1, adamw_params=("q_proj.lora_A",))
    plan = route(adapted(lora()), config)
    found = {r.name.split(".")[-4]: r.lora_update for r in plan.muon if r.factor == "B"}
    assert found == {"q_proj": "factor", "down_proj": "tangent"}


def test_other_matrices_beside_pairs_keep_their_own_group():
    model = adapted(lora())
    model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    optimizer = create_muon_optimizer(model, PRODUCT)
    assert [g["lora_update"] for g in optimizer.param_groups] == ["factor", "product"]
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 4]


@pytest.mark.parametrize("adapter", [None, lora(r=1), NOT_FACTORS["loha"]()])
def test_a_model_without_pairs_of_matrices_is_refused(adapter):
    auto = transformers.AutoModelForCausalLM
    model = adapted(adapter) if adapter else built(auto, "llama", device="cpu", **SIZES)
    with pytest.raises(ValueError, match="lora_update='product' is for LoRA factors"):
        route(model, PRODUCT)


def test_the_rank_in_the_table_is_that_of_the_adapter_on_square_layers_too():
    model = adapted(lora(r=6, target_modules=["o_proj"]))
    plan = route(model)
    a, b = plan.routes
    assert (a.factor, b.factor) == ("A", "B")
    rows = [line for line in plan.table().splitlines() if "lora_" in line]
    assert all(" 6 " in row for row in rows)


def test_one_learning_rate_moves_an_adapted_weight_as_far_as_the_weight_itself():
    """The step of BA has spectral norm η = lr·0.2·√max(m, n), from A as from B half of it."""
    model = adapted(lora(r=4, lora_alpha=12))
    optimizer = create_muon_optimizer(
        model, PRODUCT, lr=1e-3, polar_method="svd", polar_dtype="float32", lora_damping=1e-8
    )
    named = dict(model.named_parameters())
    for name, p in named.items():
        if "lora_" in name:
            torch.nn.init.normal_(p)
            p.grad = torch.randn_like(p)
    a, b = (named[name] for name in optimizer.param_groups[0]["param_names"][:2])
    old = a.detach().double().clone(), b.detach().double().clone()
    optimizer.step()
    change_a, change_b = a.double() - old[0], b.double() - old[1]
    eta = 1e-3 * 0.2 * math.sqrt(max(b.shape[0], a.shape[1]))
    for piece in (old[1] @ change_a, change_b @ old[0]):
        norm = torch.linalg.matrix_norm(3.0 * piece, 2).item()  # c = 12/4
        # The factors are of size one and their change of 1e-3 rounds at 6e-8.
        assert norm == pytest.approx(eta / 2, rel=1e-3)
