"""Twenty architectures are routed as the frozen table says.

``HF_MUON_REGENERATE=1 pytest tests/unit/routing/test_golden_routing.py`` writes the table anew;
read the difference before it is committed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from zoo import ZOO

from hf_muon.routing import RoutePlan, route

GOLDEN = Path(__file__).parents[2] / "assets" / "routing.json"

# What a rule on names and dimensions gets wrong: parameters sent to Muon, withheld from it.
NAIVE_ERRORS = {
    "llama": (0, 0),
    "qwen3": (0, 0),
    "gemma3_text": (0, 0),
    "phi3": (0, 0),
    "gpt2": (2, 0),
    "gpt_neox": (0, 0),
    "opt": (0, 0),
    "mixtral": (2, 4),
    "qwen3_moe": (2, 4),
    "gpt_oss": (6, 4),
    "llama4_text": (2, 4),
    "jamba": (2, 2),
    "mamba": (2, 0),
    "bert": (1, 0),
    "llama#cls": (1, 0),
    "t5": (3, 0),
    "vit": (1, 0),
    "clip": (0, 0),
    "llava": (0, 0),
    "qwen2_5_vl": (0, 0),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, RoutePlan]:
    return {name: route(model.build()) for name, model in ZOO.items()}


def rows(plan: RoutePlan) -> list[list[object]]:
    return [
        [r.name, list(r.shape), r.algorithm, r.reason, len(r.matrices), r.decay]
        for r in plan.routes
    ]


def counts(plan: RoutePlan) -> tuple[int, int, int, int]:
    def of(algorithm: str, dimensions: tuple[int, ...]) -> int:
        return sum(r.algorithm == algorithm and len(r.shape) in dimensions for r in plan.routes)

    vectors = of("adamw", (0, 1))
    assert of("muon", (0, 1)) == 0
    return of("muon", (2,)), of("muon", (3,)), of("adamw", (2, 3, 4, 5)), vectors


@pytest.mark.parametrize("name", ZOO)
def test_counts_are_those_of_the_survey(plans, name):
    assert counts(plans[name]) == ZOO[name].counts


def test_every_route_equals_the_frozen_one(plans):
    found = {name: rows(plan) for name, plan in plans.items()}
    if os.environ.get("HF_MUON_REGENERATE"):
        lines = ",\n".join(
            f"{json.dumps(name)}: [\n" + ",\n".join("  " + json.dumps(r) for r in table) + "\n]"
            for name, table in found.items()
        )
        GOLDEN.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


def naive(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "embed" not in name and "lm_head" not in name


@pytest.mark.parametrize("name", ZOO)
def test_a_rule_on_names_and_dimensions_would_misroute(plans, name):
    routes = plans[name].routes
    sent = sum(naive(r.name, r.shape) and r.algorithm == "adamw" for r in routes)
    withheld = sum(not naive(r.name, r.shape) and r.algorithm == "muon" for r in routes)
    assert (sent, withheld) == NAIVE_ERRORS[name]


@pytest.mark.parametrize("name", ZOO)
def test_matrices_cover_each_muon_parameter_once(plans, name):
    for r in plans[name].muon:
        assert sum(m.numel for m in r.matrices) == r.numel


@pytest.mark.parametrize("name", ["t5", "gpt2", "mamba", "gemma3_text", "bert"])
def test_a_tied_tensor_is_routed_once_as_the_embedding(plans, name):
    tied = [r for r in plans[name].routes if "tied" in r.reason]
    assert len(tied) == 1
    assert tied[0].algorithm == "adamw"
    assert not any("lm_head" in r.name for r in plans[name].routes if len(r.shape) > 1)


def test_the_survey_meets_every_kind_of_reason(plans):
    kinds = {r.kind for plan in plans.values() for r in plan.routes}
    assert kinds == {
        "embedding",
        "lm_head",
        "vector",
        "conv",
        "head",
        "router",
        "bias stack",
        "linear",
        "Conv1D",
        "experts",
        "unknown",
    }


def test_orientation_is_what_the_modules_declare(plans):
    def dims(name: str, part: str) -> set[int | None]:
        return {m.fan_out_dim for r in plans[name].muon if part in r.name for m in r.matrices}

    assert dims("llama", "proj") == {0}
    assert dims("gpt2", "c_attn") == {1}
    assert dims("mixtral", "experts") == {0}
    assert dims("gpt_oss", "experts") == {1}
    assert dims("llama4_text", "experts") == {None}
