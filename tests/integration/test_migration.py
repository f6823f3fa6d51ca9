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
from hf_muon.optimizer import import_state
from tests.distributed.launch import ON_CPU, ROOT

RATE, STEPS = 0.02, 3
SHAPES, VECTOR = [(16, 24), (48, 16), (16, 16)], (7,)
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
for given in gradients[:-1]:
    weight, momentum = torch.ones_like(given[0]), torch.zeros_like(given[0])
    for gradient in given:
        weight -= rate * original_muon.muon_update(gradient.clone(), momentum)
    weights.append(weight)
torch.save(weights, "weights.pt")

# Its optimizer, stopped between two steps; the last parameter is AdamW's.
*matrices, vector = params = [torch.nn.Parameter(torch.ones_like(g[0])) for g in gradients]
groups = [
    {"params": matrices, "lr": rate, "use_muon": True, "ns_method": "standard"},
    {"params": [vector], "lr": rate / 10, "weight_decay": 0.0, "use_muon": False},
]
optimizer = original_muon.SingleDeviceMuonWithAuxAdam(groups)
original_muon.ns_compute_dtype = lambda method: torch.float32
for step in range(len(gradients[0])):
    for p, given in zip(params, gradients):
        p.grad = given[step].clone()
    optimizer.step()
    state = {"state": optimizer.state_dict(), "weights": [p.detach() for p in params]}
    torch.save(state, f"after-{step}.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gradients of each shape and of a vector, and what DeepSpeed's Muon makes of them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    gradients = [[torch.randn(shape) for _ in range(STEPS)] for shape in [*SHAPES, VECTOR]]
    torch.save(gradients, folder / "gradients.pt")
    command = [sys.executable, "-c", DEEPSPEEDS, str(RATE)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | ON_CPU, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture
def deepspeeds(folder):
    """Gradients of each shape of a matrix, and the weights that they lead to."""
    gradients, weights = (torch.load(folder / f"{name}.pt") for name in ("gradients", "weights"))
    return dict(zip(SHAPES, zip(gradients[:-1], weights, strict=True), strict=True))


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


def test_the_state_of_deepspeeds_muon_goes_on(folder):
    gradients = torch.load(folder / "gradients.pt")
    steps = [torch.load(folder / f"after-{step}.pt") for step in range(STEPS)]

    def one_step_on(takes_over):
        """How far from DeepSpeed's weights, after a step from where it was a step before."""
        params = [torch.nn.Parameter(p.clone()) for p in steps[-2]["weights"]]
        names = list(map(str, range(len(params))))
        config = MuonConfig(
            **settings("DeepSpeed's `Muon`"),
            lr=RATE,
            adamw_lr=RATE / 10,
            adamw_betas=(0.9, 0.95),
            adamw_eps=1e-10,
            polar_dtype="float32",
            polar_method="newton_schulz",
        )
        *matrices, vector = zip(names, params, strict=True)
        groups = [
            {"params": matrices, **config.muon_group()},
            {"params": [vector], **config.adamw_group()},
        ]
        optimizer = Muon(groups, config=config)
        if takes_over:
            assert import_state(optimizer, steps[-2]["state"], names) == names
        for p, given in zip(params, gradients, strict=True):
            p.grad = given[-1].clone()
        optimizer.step()
        pairs = zip(params, steps[-1]["weights"], strict=True)
        return [float((p - other).detach().abs().max()) for p, other in pairs]

    # Weights around 1 in float32, and a polar factor whose products round in another order.
    assert max(one_step_on(True)) < 1e-6
    assert min(one_step_on(False)) > 1e-4


@pytest.mark.parametrize(
    "start", ["`torch.optim.Muon` with its d", "Moonlight's", "DeepSpeed's `M"]
)
def test_the_settings_of_a_row_are_settings(start):
    config = MuonConfig(**settings(start), lr=RATE, adamw_lr=1e-3)
    assert config.coefficients == "quintic"
