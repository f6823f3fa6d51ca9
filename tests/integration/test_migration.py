"""The settings that docs/learning_rates.md gives for other Muons make the steps that those make.

torch's own is compared in tests/unit/optimizer/test_torch_parity.py.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from hf_muon import Muon, MuonConfig
from tests.distributed.launch import ON_CPU, ROOT

RATE, STEPS = 0.02, 3
SHAPES = [(16, 24), (48, 16), (16, 16)]
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


# In a process of its own: no other test is to meet DeepSpeed.
DEEPSPEEDS = """
import sys
import torch
from deepspeed.runtime.zero.muon import original_muon

rate, gradients = float(sys.argv[1]), torch.load("gradients.pt")
weights = []
torch.compiler.set_stance("force_eager")  # compiling takes longer than the test
for given in gradients:
    weight, momentum = torch.ones_like(given[0]), torch.zeros_like(given[0])
    for gradient in given:
        weight -= rate * original_muon.muon_update(gradient, momentum)
    weights.append(weight)
torch.save(weights, "weights.pt")
"""


@pytest.fixture(scope="module")
def deepspeeds(tmp_path_factory):
    """Gradients of each shape, and the weights that DeepSpeed's Muon makes of them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    gradients = [[torch.randn(shape) for _ in range(STEPS)] for shape in SHAPES]
    torch.save(gradients, folder / "gradients.pt")
    command = [sys.executable, "-c", DEEPSPEEDS, str(RATE)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | ON_CPU, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weights = torch.load(folder / "weights.pt")
    return dict(zip(SHAPES, zip(gradients, weights, strict=True), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_deepspeeds_muon(shape, deepspeeds):
    gradients, theirs = deepspeeds[shape]
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
