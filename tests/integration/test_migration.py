"""The settings that docs/learning_rates.md gives for other Muons make the steps that those make.

torch's own is compared in tests/unit/optimizer/test_torch_parity.py.
"""

import re

import pytest
import torch
from deepspeed.runtime.zero.muon import original_muon

from hf_muon import Muon, MuonConfig
from tests.distributed.launch import ROOT

RATE, STEPS = 0.02, 3
PAGE = ROOT / "docs" / "learning_rates.md"


def row(start):
    """The cells of a row of the table of migrations."""
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def settings(start):
    """The settings of a row; values that it leaves to the reader are left out."""
    pairs = re.search(r"`([^`]*)`", row(start)[3])[1].split(",")
    return dict(pair.split("=") for pair in pairs if not pair.endswith("…"))


def ours(shape, gradients, **overrides):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = Muon([weight], lr=RATE, weight_decay=0.0, **overrides)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def deepspeeds(shape, gradients):
    weight, momentum = torch.ones(shape), torch.zeros(shape)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than the test
        for gradient in gradients:
            weight -= RATE * original_muon.muon_update(gradient.clone(), momentum)
    return weight


@pytest.mark.parametrize("shape", [(16, 24), (48, 16), (16, 16)])
def test_deepspeeds_muon(shape):
    gradients = [torch.randn(shape) for _ in range(STEPS)]
    theirs = deepspeeds(shape, gradients)
    exact = {"polar_dtype": "float32"}  # as theirs is on a CPU
    found = ours(shape, gradients, **settings("DeepSpeed's `Muon`"), **exact)
    largest = (theirs - 1).abs().max()
    # Roundings of the iteration.
    assert (found - theirs).abs().max() < 1e-4 * largest
    other = ours(shape, gradients, adjust_lr="original", **exact)  # with the default coefficients
    assert (other - theirs).abs().max() > 1e-2 * largest


@pytest.mark.parametrize(
    "start", ["`torch.optim.Muon` with its d", "Moonlight's", "DeepSpeed's `M"]
)
def test_the_settings_of_a_row_are_settings(start):
    config = MuonConfig(**settings(start), lr=RATE, adamw_lr=1e-3)
    assert config.coefficients == "quintic"
