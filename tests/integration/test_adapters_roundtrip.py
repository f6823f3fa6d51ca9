"""Adapters trained by name, saved, and used by a process that has never heard of this package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import hf_muon.auto  # noqa: F401
from hf_muon.integrations.report import find_muon
from tests.integration.tiny import TINY, tiny_data, tiny_llama, trained

peft = pytest.importorskip("peft")


def tiny_mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))


EXPERTS = {
    "target_modules": [],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
ADAPTERS = {
    "lora": (tiny_llama, {}),
    "rslora": (tiny_llama, {"use_rslora": True}),
    "pissa": (tiny_llama, {"init_lora_weights": "pissa"}),
    "dora": (tiny_llama, {"use_dora": True}),
    "experts": (tiny_mixtral, EXPERTS),
}
INPUTS = tiny_data(4)[0]["input_ids"][None]


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def train_and_save(name, folder):
    """Train an adapter; its base model and itself on disk, its logits, and the optimizer."""
    make, settings = ADAPTERS[name]
    base = make()
    base.save_pretrained(folder / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    )
    model = peft.get_peft_model(base, config)
    start = logits(model)
    conversion = {}
    if name == "pissa":
        # It takes its factors out of the base weights. PEFT's own conversion makes a LoRA adapter
        # of twice the rank for the base weights as they were.
        model.save_pretrained(folder / "start")
        conversion = {"path_initial_model_for_weight_conversion": str(folder / "start")}
    trainer = trained(folder / "trainer", model=model)
    end = logits(trainer.model)
    trainer.model.save_pretrained(folder / "adapter", **conversion)
    return start, end, find_muon(trainer.optimizer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every adapter, trained here; and what another process computes with it."""
    root = tmp_path_factory.mktemp("adapters")
    torch.set_num_threads(1)
    here = {name: train_and_save(name, root / name) for name in ADAPTERS}
    folders = {name: (str(root / name / "base"), str(root / name / "adapter")) for name in ADAPTERS}
    torch.save({"inputs": INPUTS, "adapters": folders}, root / "request.pt")
    script = Path(__file__).with_name("stock_peft.py")
    subprocess.run(
        [sys.executable, script, root / "request.pt", root / "found.pt"],
        cwd=root, check=True, timeout=240,
    )  # fmt: skip
    return here, torch.load(root / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", ADAPTERS)
def test_factors_are_trained_by_muon_in_pairs(runs, name):
    start, end, optimizer = runs[0][name]
    groups = optimizer.param_groups
    assert [g["algorithm"] for g in groups] == (["muon", "adamw"] if name == "dora" else ["muon"])
    assert all(".lora_A." in n or ".lora_B." in n for n in groups[0]["param_names"])
    assert set(groups[0]["pairs"]) == set(groups[0]["param_names"])
    assert {len(matrices) for matrices in groups[0]["matrices"]} == {4 if name == "experts" else 1}
    assert (end - start).abs().max() > 1e-3


def test_the_other_process_never_imported_this_package(runs):
    modules = runs[1]["modules"]
    assert "peft" in modules
    assert not [m for m in modules if m.partition(".")[0] == "hf_muon"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_adapter_computes_what_was_trained(runs, name):
    _, end, _ = runs[0][name]
    found = runs[1]["logits"][name]
    # The same operations on the same bits; PiSSA's conversion splits BA into other products.
    assert torch.allclose(found["loaded"], end, rtol=0, atol=1e-6 if name == "pissa" else 0)
    assert (found["without"] - end).abs().max() > 1e-3


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("kind", ["merged", "unmerged", "unloaded"])
def test_merging_and_unmerging_keep_the_logits(runs, name, kind):
    found = runs[1]["logits"][name]
    # BA is added to the weight before the product with the input instead of after it, in float32:
    # roundings of 6e-8 in logits below one.
    assert (found[kind] - found["loaded"]).abs().max() < 1e-6
