"""Adapters are routed by the container that holds them, whatever they are called."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from adapted import LINEARS, NOT_FACTORS, adapted, lora, peft, with_experts, with_two_adapters
from zoo import SIZES, built, region

from hf_muon.config import MuonConfig
from hf_muon.routing import RoutePlan, route


def by_kind(plan: RoutePlan) -> tuple[set[str], set[str]]:
    """The tensors on each side: the last steps of their names, without module and layer."""

    def last(name: str) -> str:
        steps = name.split(".")
        return next((s for s in steps if s.startswith(("lora_", "modules_to_save"))), steps[-1])

    return {last(r.name) for r in plan.muon}, {last(r.name) for r in plan.adamw}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=["lora", "rslora", "pissa", "olora"],
)
def test_lora_factors_are_pairs_of_matrices(options):
    model = adapted(peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **options))
    plan = route(model)
    assert len(plan.muon) == 4
    assert plan.adamw == ()
    routes = {r.name: r for r in plan.routes}
    for name, r in routes.items():
        assert r.pair == name.replace("lora_A", "#").replace("lora_B", "lora_A").replace(
            "#", "lora_B"
        )
        assert routes[r.pair].pair == name
        assert r.scaling == (4.0 if options.get("use_rslora") else 2.0)
        assert [m.fan_out_dim for m in r.matrices] == [0]
    groups = plan.param_groups(MuonConfig(lr=0.1))
    assert [g["algorithm"] for g in groups] == ["muon"]  # the AdamW half is empty: no group
    assert groups[0]["pairs"] == tuple(r.pair for r in plan.muon)


def test_a_frozen_partner_leaves_a_factor_single():
    model = adapted(peft.LoraConfig(r=4, target_modules=LINEARS))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    plan = route(model)
    assert len(plan.muon) == 2
    assert all(r.pair is None for r in plan.muon)
    assert "pairs" not in plan.param_groups(MuonConfig(lr=0.1))[0]


def test_a_factor_sent_to_adamw_leaves_its_partner_single():
    model = adapted(peft.LoraConfig(r=4, target_modules=LINEARS))
    plan = route(model, MuonConfig(adamw_params=("lora_B",)))
    assert {r.pair for r in plan.routes} == {None}


def test_rank_one_factors_are_vectors():
    plan = route(adapted(peft.LoraConfig(r=1, target_modules=LINEARS)))
    assert plan.muon == ()


def test_lora_on_embedding_goes_to_adamw_and_on_the_head_to_muon():
    model = adapted(peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]))
    plan = route(model)
    routes = {r.name: r for r in plan.routes}
    assert {r.algorithm for n, r in routes.items() if "lora_embedding" in n} == {"adamw"}
    assert {r.algorithm for n, r in routes.items() if "lm_head.lora" in n} == {"muon"}
    assert sum("lora_embedding" in n for n in routes) == 2


def test_factors_that_are_the_memory_of_two_layers_go_to_adamw():
    settings = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = adapted(lora(**settings), tie_word_embeddings=True)
    tied = route(model)
    shared = [r for r in tied.routes if r.kind == "shared memory"]
    assert len(shared) == 4
    assert set(shared) == {r for r in tied.adamw if re.search("lm_head|embed", r.name)}
    for one in shared:  # each names the other of its pair
        other = one.reason.rpartition(" ")[2]
        assert ("embed_tokens" in one.name) == ("lm_head" in other)
    assert all(r.pair for r in tied.muon)
    assert {r.name.split(".")[-4] for r in tied.muon} == {"q_proj"}
    with pytest.raises(ValueError, match=r"shares its memory with .*, and what is written twice"):
        route(model, MuonConfig(muon_params=("lm_head",)))


def test_dora_magnitudes_and_biases_go_to_adamw():
    model = adapted(peft.LoraConfig(r=4, target_modules=LINEARS, use_dora=True))
    assert by_kind(route(model)) == ({"lora_A", "lora_B"}, {"lora_magnitude_vector"})
    model = adapted(peft.LoraConfig(r=4, target_modules=LINEARS, lora_bias=True))
    plan = route(model)
    assert {r.name.rpartition(".")[2] for r in plan.adamw} == {"bias"}
    assert len(plan.muon) == 4


def test_modules_to_save_go_to_adamw():
    auto = transformers.AutoModelForSequenceClassification
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    plan = route(adapted(adapter, auto))
    saved = [r for r in plan.routes if "modules_to_save" in r.name]
    assert [r.algorithm for r in saved] == ["adamw"]
    assert saved[0].kind == "modules_to_save"
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"])
    saved = [r for r in route(adapted(adapter)).routes if "modules_to_save" in r.name]
    assert [r.algorithm for r in saved] == ["adamw"]


def test_each_trainable_adapter_has_its_own_pairs():
    model = with_two_adapters(["default", "second"])
    plan = route(model)
    facts = {
        (r.name.split(".")[-2], r.pair.split(".")[-2]): (r.scaling, r.matrices[0].rows)
        for r in plan.muon
        if "q_proj.lora_A" in r.name
    }
    assert facts == {("default", "default"): (2.0, 4), ("second", "second"): (0.5, 8)}
    assert len(plan.muon) == 6
    assert plan.adamw == ()


def test_an_adapter_that_is_not_active_is_not_trained():
    plan = route(with_two_adapters(["second"]))
    assert {r.name.split(".")[-2] for r in plan.routes} == {"second"}
    assert len(plan.muon) == 2
    assert plan.fingerprint != route(with_two_adapters(["default", "second"])).fingerprint


def test_the_table_shows_partner_rank_and_scaling_of_factors():
    def cells(plan, name, compact=False):
        lines = plan.table(compact=compact).splitlines()
        header = next(line for line in lines if "partner" in line)
        line = next(line for line in lines if name in line)
        titles, values = (
            [cell.strip() for cell in text.strip(border).split(border)]
            for text, border in ((header, "┃"), (line, "│"))
        )
        row = dict(zip(titles, values, strict=True))
        return row["partner"], row["rank"], row["scaling"]

    plan = route(with_two_adapters(["default", "second"]))
    assert cells(plan, "q_proj.lora_A.second") == ("lora_B.second.weight", "8", "0.5")
    assert cells(plan, "q_proj.lora_B.second") == ("lora_A.second.weight", "8", "0.5")
    experts = route(with_experts("mixtral"))
    assert cells(experts, "experts.lora_B", compact=True) == ("lora_A.default.weight", "3", "2")
    dora = route(adapted(lora(use_dora=True)))
    assert cells(dora, "lora_magnitude_vector") == ("", "", "")
    alone = route(adapted(lora()), MuonConfig(adamw_params=("lora_B",)))
    assert cells(alone, "q_proj.lora_A") == ("none", "4", "2")
    assert "partner" not in route(adapted(NOT_FACTORS["ia3"]())).table()


def test_trainable_tokens_go_to_adamw():
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2, 3])
    plan = route(adapted(adapter))
    delta = [r for r in plan.routes if "trainable_tokens_delta" in r.name]
    assert [(r.algorithm, r.shape) for r in delta] == [("adamw", (3, 32))]
    assert len(plan.muon) == 2


def test_conv1d_adapters_are_stored_like_linear_ones():
    adapter = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 4}
    plan = route(adapted(adapter, name="gpt2", **gpt2))
    assert [r.shape for r in plan.muon] == [(4, 32), (96, 4)]
    assert {m.fan_out_dim for r in plan.muon for m in r.matrices} == {0}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", NOT_FACTORS)
def test_what_is_no_factor_of_a_linear_map_goes_to_adamw(method):
    plan = route(adapted(NOT_FACTORS[method]()))
    assert plan.routes
    assert plan.muon == ()
    with pytest.raises(ValueError, match="Nothing to train with Muon"):
        plan.param_groups(MuonConfig(lr=0.1))


def test_loha_can_be_sent_to_muon():
    plan = route(adapted(NOT_FACTORS["loha"]()), MuonConfig(muon_params=("hada_",)))
    assert len(plan.muon) == len(plan.routes) == 8


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_expert_adapters_are_one_pair_of_matrices_per_expert(name):
    model = with_experts(name)
    routes = {r.name: r for r in route(model).routes}
    parameters = dict(model.named_parameters())
    wrappers = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    assert len(wrappers) == 2
    for wrapper in wrappers:
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        torch.nn.init.normal_(b)
        of_a, of_b = (
            next(r for n, r in routes.items() if parameters[n] is factor) for factor in (a, b)
        )
        assert (of_a.pair, of_b.pair) == (of_b.name, of_a.name)
        delta = wrapper.get_delta_weight("default").detach()
        for expert, (left, right) in enumerate(zip(of_b.matrices, of_a.matrices, strict=True)):
            product = of_a.scaling * region(left, b.detach()) @ region(right, a.detach())
            used = delta[expert] if product.shape == delta[expert].shape else delta[expert].T
            torch.testing.assert_close(product, used)
        consecutive = b.detach().view(b.shape[0], 4, 3)[:, 0]
        assert not torch.allclose(consecutive, region(of_b.matrices[0], b.detach()))
    declared = {None} if name == "llama4_text" else {0}
    assert {m.fan_out_dim for r in routes.values() for m in r.matrices} == declared


def test_a_base_weight_trained_beside_lora_follows_the_ordinary_rules():
    model = adapted(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    base = model.get_base_model()
    base.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    base.model.layers[0].input_layernorm.weight.requires_grad_(True)
    base.model.embed_tokens.weight.requires_grad_(True)
    kinds = {r.name.removeprefix("base_model.model.model."): r.kind for r in route(model).routes}
    assert kinds["layers.0.self_attn.q_proj.base_layer.weight"] == "linear"
    assert kinds["layers.0.input_layernorm.weight"] == "vector"
    assert kinds["embed_tokens.weight"] == "embedding"


def test_adapters_injected_without_a_peft_model():
    model = built(transformers.AutoModelForCausalLM, "llama", device="cpu", **SIZES)
    adapter = peft.LoraConfig(r=4, target_modules=LINEARS)
    plan = route(peft.inject_adapter_in_model(adapter, model))
    assert len(plan.muon) == 8
    assert all("lora_" in r.name and r.pair for r in plan.muon)


def test_a_wrapped_peft_model_is_recognized():
    model = adapted(peft.LoraConfig(r=4, target_modules=LINEARS))
    plan, wrapped = route(model), route(torch.nn.DataParallel(model))
    assert wrapped.fingerprint == plan.fingerprint
    assert all(r.pair for r in wrapped.routes)
