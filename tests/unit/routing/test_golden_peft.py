"""Every adapter method is routed as the frozen table says.

``HF_MUON_REGENERATE=1 pytest tests/unit/routing/test_golden_peft.py`` writes the table anew; read
the difference before it is committed.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from adapted import ADAPTED, NOT_FACTORS

from hf_muon.routing import RoutePlan, route

GOLDEN = Path(__file__).parents[2] / "assets" / "peft_routing.json"


@pytest.fixture(scope="module")
def plans() -> dict[str, RoutePlan]:
    return {method: route(make()) for method, make in ADAPTED.items()}


def rows(plan: RoutePlan) -> list[list[object]]:
    return [
        [r.name, list(r.shape), r.algorithm, r.reason, len(r.matrices), r.decay, r.pair, r.scaling]
        for r in plan.routes
    ]


@pytest.mark.filterwarnings("ignore")
def test_every_route_equals_the_frozen_one(plans):
    found = {method: rows(plan) for method, plan in plans.items()}
    if os.environ.get("HF_MUON_REGENERATE"):
        lines = ",\n".join(
            f"{json.dumps(method)}: [\n" + ",\n".join("  " + json.dumps(r) for r in table) + "\n]"
            for method, table in found.items()
        )
        GOLDEN.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ADAPTED)
def test_muon_trains_linear_lora_factors_and_nothing_else(plans, method):
    of_factors = {
        r.name for r in plans[method].routes if re.search(r"\.lora_[AB]\.\w+\.weight$", r.name)
    }
    assert {r.name for r in plans[method].muon} == of_factors
    assert bool(plans[method].muon) is (method not in NOT_FACTORS)


@pytest.mark.parametrize("method", ADAPTED)
def test_partners_are_mutual_and_fit(plans, method):
    routes = {r.name: r for r in plans[method].routes}
    for r in plans[method].muon:
        partner = routes[r.pair]
        assert (partner.pair, partner.scaling) == (r.name, r.scaling)
        a, b = (r, partner) if ".lora_A." in r.name else (partner, r)
        for left, right in zip(b.matrices, a.matrices, strict=True):
            assert left.cols == right.rows  # the rank
