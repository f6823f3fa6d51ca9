"""What a step asks of a GPU stays within bounds, and nothing of it lies on the wrong device.

Counted on fake CUDA tensors, and a few on those of MPS, in another process (``fake_cuda.py``);
estimates where torch decides how many kernels it launches. No time is measured here.
"""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from hf_muon.config import MuonConfig
from hf_muon.optimizer import Muon
from hf_muon.rules import _OF_PACKAGE as OF_PACKAGE
from hf_muon.rules import FILTERS, MAPS, PAIR_MAPS, PREFILTERS, RESCALES, WRITES
from scripts.scaling_table import MODELS
from tests.distributed.launch import ROOT
from tests.unit.gpu.fake_cuda import compiled_guard

pytestmark = pytest.mark.full  # half a minute, for all of it together
assert Muon  # fills the tables of rules
MIB = 2**20


class Bounds(NamedTuple):
    """The most operations, launches, host waits and MiB of temporaries of a step."""

    operations: int
    launches: int
    waits: int
    peak: int


# 7B has eight of its 32 layers here: buckets are full long before, so that all but the memory grows
# with the layers, and the other 24 would take most of the time of these tests. A bucket of 512 MiB
# and an iteration on it, whose temporaries are three times as large, make 2 GiB; where matrices lie
# both ways, or have odd sides, they get memory of their own as well.
BOUNDS = {
    "130M": Bounds(330, 300, 1, 560),
    "1B": Bounds(700, 650, 1, 2400),
    "7B, eight layers": Bounds(800, 900, 1, 2100),
    "lora 130M": Bounds(500, 150, 1, 16),
}


def others(model):
    """What a LLaMA has for AdamW: two embeddings and the norms."""
    llama = MODELS[model]
    vocabulary = (32000, llama.hidden)
    return [vocabulary, vocabulary, *[(llama.hidden,)] * (2 * llama.layers + 1)]


SIZES = {
    "130M": {"model": "130M", "others": others("130M")},
    "1B": {"model": "1B", "others": others("1B")},
    "7B, eight layers": {"model": "7B", "layers": 8},
    "lora 130M": {"model": "lora 130M"},
}
# What breaks each bound.
CONTROLS = {
    "torch's Muon on 130M": {"model": "130M", "optimizer": "torch"},
    "torch's Muon on factors": {"model": "lora 130M", "optimizer": "torch"},
    "small buckets": {**SIZES["130M"], "settings": {"bucket_mb": 8, "polar_kernel": "torch"}},
    "reads a value": {"model": "130M", "layers": 1, "settings": {"filter": "reads_a_value"}},
    "mixes devices": {"model": "130M", "layers": 1, "settings": {"filter": "mixes_devices"}},
    "large buckets": {**SIZES["130M"], "settings": {"bucket_mb": 4096, "polar_dtype": "float32"}},
}
SMALL = [(48, 48), (48, 48), (96, 48), (48, 130), (7, 5), (5, 7), (1, 9), (3, 3000)]
PAIRS = [(8, 48), (96, 8), (8, 48), (48, 8), (8, 96), (48, 8)]
# Tests elsewhere may have registered their own.
FILTERS, MAPS, RESCALES = (OF_PACKAGE.intersection(table) for table in (FILTERS, MAPS, RESCALES))
CHOICES = {
    "order": ["pre_polar", "post_polar", "polar_only"],
    "prefilter": list(PREFILTERS),
    "filter": sorted(FILTERS),
    "momentum": [[0.9, 0.98], "auto"],
    "nesterov": [False],
    "matrix_map": sorted(MAPS),
    "rescale": sorted(RESCALES),
    "match_update_rms": [True],
    "step_rule": [name for name in WRITES if name != "change"],
    "cautious_weight_decay": [True],
    "momentum_dtype": ["int8", "bfloat16", "float32"],
    "momentum_warmup_steps": [5],
    "skip_zero_gradients": [True],
    "polar_method": ["newton_schulz", "gram", "svd"],
    "coefficients": ["quintic", "polar_express", "tight"],
    "polar_dtype": ["bfloat16", "float16", "float32", "float64"],
}
WITH = {  # what a choice needs beside it
    "match_update_rms": {"order": "post_polar"},
    "momentum_warmup_steps": {"momentum_start": 0.8},
}
RULES = {
    f"{name}={value}": {
        "shapes": SMALL,
        "others": [(64,)],
        "settings": {name: value, **WITH.get(name, {})},
    }
    for name, values in CHOICES.items()
    for value in values
}
RULES |= {
    f"{name}={value}, weights in bfloat16": {**RULES[f"{name}={value}"], "dtype": "bfloat16"}
    for name, value in [("order", "pre_polar"), ("momentum_dtype", "float32"), ("rescale", "rows")]
}
RULES |= {
    f"lora_update={value}": {"shapes": PAIRS, "settings": {"lora_update": value, **more}}
    for value in PAIR_MAPS
    for more in [{"tangent_balance_every": 1} if PAIR_MAPS[value].balances else {}]
}
# Whose products are in float32, under a Trainer with tf32=True and bf16=True.
FULL = {
    name: {**case, "tf32": True}
    for name, case in [
        ("float32", RULES["polar_dtype=float32"]),
        ("svd", RULES["polar_method=svd"]),
        *((f"lora {update}", RULES[f"lora_update={update}"]) for update in PAIR_MAPS),
    ]
}
# MPS has no float64, in which norms, sums of whole matrices and pairs of LoRA factors are computed.
# These rules need none of that.
ON_MPS = {
    name: {**RULES[name], "device": "mps"}
    for name in (
        "order=pre_polar", "order=post_polar", "matrix_map=polargrad", "momentum_dtype=int8",
        "cautious_weight_decay=True", "coefficients=tight",
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = {
        f"{kind} {name}": case
        for kind, of in [
            ("size", SIZES), ("control", CONTROLS), ("rule", RULES), ("full", FULL), ("mps", ON_MPS)
        ]
        for name, case in of.items()
    }  # fmt: skip
    library = compiled_guard(tmp_path_factory.mktemp("guard"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.gpu.fake_cuda", str(library)],
        input=json.dumps(cases), capture_output=True, text=True, cwd=ROOT, timeout=250,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("what", Bounds._fields)
def test_a_step_stays_within_its_bounds(found, size, what):
    case = found[f"size {size}"]
    assert "error" not in case, case["error"]
    asked, bound = case[what] / (MIB if what == "peak" else 1), getattr(BOUNDS[size], what)
    busiest = sorted(case["by_name"].items(), key=lambda pair: -pair[1])[:8]
    assert asked <= bound, f"{size}: {asked:,.0f} {what}; {busiest}; waits: {case['waited']}"


@pytest.mark.parametrize(
    ("control", "what", "size"),
    [
        ("torch's Muon on 130M", "operations", "130M"),
        ("torch's Muon on 130M", "launches", "130M"),
        ("small buckets", "operations", "130M"),
        ("small buckets", "launches", "130M"),
        ("torch's Muon on factors", "launches", "lora 130M"),
        ("reads a value", "waits", "130M"),
        ("large buckets", "peak", "130M"),
    ],
)
def test_the_bounds_can_be_broken(found, control, what, size):
    case = found[f"control {control}"]
    asked = case[what] / (MIB if what == "peak" else 1)
    assert asked > getattr(BOUNDS[size], what)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_on_the_wrong_device(found, rule):
    case = found[f"rule {rule}"]
    assert "error" not in case, case["error"]
    assert case["operations"] > 0
    # Muon's count is read on the CPU; the fused kernel of AdamW counts on its device.
    expected = {name: "cuda" for name in case["places"]} | {"step of muon": "cpu"}
    assert case["places"] == expected


def test_a_mixture_of_devices_is_noticed(found):
    assert "device" in found["control mixes devices"]["error"]


@pytest.mark.parametrize("name", FULL)
def test_products_in_float32_are_not_cut_to_tf32(found, name):
    case = found[f"full {name}"]
    assert "error" not in case, case["error"]
    assert case["precisions"] == ["ieee"]
    assert case["autocast"] == [False]
    assert case["afterwards"] == ["tf32", True]


def test_tf32_would_be_noticed(found):
    # In bfloat16 nothing is touched.
    assert found["control small buckets"]["precisions"] == ["none"]


@pytest.mark.parametrize("rule", ON_MPS)
def test_what_mps_can_train_asks_for_no_float64(found, rule):
    case = found[f"mps {rule}"]
    assert "error" not in case, case["error"]
    assert case["in_float64"] == []
    assert found["rule step_rule=hyperball"]["in_float64"]  # so that it would be seen


def test_every_choice_of_the_settings_is_there():
    """The lists above follow from the tables; the rest must be fields of the settings."""
    assert set(CHOICES) | {"lora_update"} <= set(MuonConfig().to_dict())
    assert {"soft", "polargrad"} <= set(CHOICES["matrix_map"])
    assert {"additive", "relative", "hyperball"} <= set(CHOICES["step_rule"])
