"""The way of working on an accelerator, with real numbers: on a CPU that is told to be none.

Buckets, portions and batches are then those of a GPU, and every kernel is a CPU's.
"""

import statistics
import time

import pytest
import torch

from hf_muon import Muon
from scripts.scaling_table import Llama

# Host time of a step over that of torch.optim.Muon on the same matrices.
MOST_OF_TORCHS = 1.0
SHAPES = [(64, 64)] * 4 + [(173, 64)] * 2 + [(64, 173), (5, 7), (7, 5), (1, 9)]
PAIRS = [(4, 64), (96, 4), (4, 64), (64, 4), (4, 96), (64, 4)]


@pytest.fixture
def no_cpu(monkeypatch):
    """From the call on, no device counts as a CPU."""
    return lambda: monkeypatch.setattr("hf_muon.polar.devices.is_cpu", lambda device: False)


@pytest.fixture
def _nothing_is_zero_by_chance():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def trained(settings, steps=4, shapes=(*SHAPES, *SHAPES)):
    """Weights after some steps in float64."""
    torch.manual_seed(0)
    by_pairs = settings.get("lora_update", "factor") != "factor"
    shapes = PAIRS if by_pairs else shapes
    params = [torch.nn.Parameter(torch.randn(shape).double() * 0.1) for shape in shapes]
    group = {"params": params}
    if by_pairs:
        names = [f"m{i // 2}.lora_{'AB'[i % 2]}.weight" for i in range(len(params))]
        group = {
            "params": list(zip(names, params, strict=True)),
            "pairs": [names[i ^ 1] for i in range(len(names))],
            "factors": ["A", "B"] * (len(params) // 2),
            "scalings": [2.0] * len(params),
        }
    settings = {"weight_decay": 0.1, "polar_dtype": "float64", **settings}
    optimizer = Muon([group], lr=1e-2, **settings)
    for step in range(steps):
        numbers = torch.Generator().manual_seed(step)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=numbers).double()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in params])


RULES = {
    "defaults": {},
    "post_polar": {"order": "post_polar", "match_update_rms": True},
    "polar_only": {"order": "polar_only"},
    "tight": {"coefficients": "tight", "polar_steps": 4, "cautious_weight_decay": True},
    "kernel": {"momentum": (0.9, 0.98), "nesterov": False},
    "auto": {"momentum": "auto"},
    "clip": {"prefilter": "clip", "step_rule": "relative"},
    "rows": {"rescale": "rows"},
    "entries": {"rescale": "entries", "step_rule": "hyperball", "weight_decay": 0.0},
    "polargrad": {"matrix_map": "polargrad"},
    "soft": {"matrix_map": "soft"},
    "svd": {"polar_method": "svd"},
    "int8": {"momentum_dtype": "int8"},
    "zeros skipped": {"skip_zero_gradients": True},
    "product": {"lora_update": "product"},
    "tangent": {"lora_update": "tangent", "tangent_balance_every": 2},
}
# Both ways add the same numbers in another order, at a relative 1e-16 a time. The iteration
# stretches what is small by at most 10³ to 10⁴, and sides are below 200: 1e-10 has room, and is far
# below the changes of 1e-2 that a step makes.
TOLERANCE = 1e-10


@pytest.mark.usefixtures("_nothing_is_zero_by_chance")
@pytest.mark.parametrize("rule", RULES)
def test_both_ways_train_the_same_weights(rule, no_cpu):
    expected = trained(RULES[rule])
    other = trained(RULES[rule], steps=3)
    no_cpu()
    found = trained(RULES[rule])
    assert (found - expected).abs().max() <= TOLERANCE
    assert (found - other).abs().max() > 1e4 * TOLERANCE


def test_the_way_is_another(no_cpu, monkeypatch):
    """The comparison above would be empty if the CPU's way were taken twice."""
    batches = []
    run = torch.bmm

    def bmm(A, B, **more):
        batches.append(len(A))
        return run(A, B, **more)

    monkeypatch.setattr(torch, "bmm", bmm)
    large = [(300, 300)] * 3  # which a CPU maps one by one
    trained({}, steps=1, shapes=large)
    assert not batches
    no_cpu()
    trained({}, steps=1, shapes=large)
    assert set(batches) == {3}


def process_time(optimizer):
    start = time.process_time()
    optimizer.step()
    return time.process_time() - start


def seconds(shapes, make, others, rounds):
    """Medians of the process time of steps that take turns."""
    optimizers = []
    for build in (make, others):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for one in params:
            one.grad = torch.randn_like(one)
        optimizers.append(build(params))
        optimizers[-1].step()
    taken = [[process_time(one) for one in optimizers] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*taken, strict=True)]


def tiny_1b():
    """168 matrices of a LLaMA of 1B whose sides are 256 times smaller, and 512 MiB of it.

    In float32, of twice the bytes: batched products in bfloat16 are arithmetic on a CPU even here.
    """
    shapes = [one.shape for one in Llama(8, 21, 24, 8).parameters()]
    return shapes, 2 * 512 / 256**2


def ours(**settings):
    return lambda params: Muon(params, lr=1e-3, polar_dtype="float32", **settings)


def torchs(params):
    return torch.optim.Muon(params, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def test_the_host_takes_no_longer_than_for_torchs_muon(no_cpu):
    """Arithmetic on such matrices is nothing, so that what is left is the host's work."""
    shapes, bucket = tiny_1b()
    no_cpu()
    here, there = seconds(shapes, ours(bucket_mb=bucket), torchs, rounds=9)
    assert here <= MOST_OF_TORCHS * there, f"{1e3 * here:.1f} ms, torch {1e3 * there:.1f} ms"


def test_the_bound_on_host_time_can_be_broken(no_cpu):
    """With a bucket for each matrix."""
    shapes, _ = tiny_1b()
    no_cpu()
    here, there = seconds(shapes, ours(bucket_mb=1e-6), torchs, rounds=5)
    assert here > MOST_OF_TORCHS * there
