"""What a polar factor costs, counted: operations and memory, not time."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_muon import Muon
from hf_muon.polar import kernels, orthogonalize


def operations(x, **settings):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(x, **settings)
    return counter.get_total_flops()


def quintic(s, l):  # noqa: E741
    """Five steps on X, as torch.optim.Muon computes them."""
    return 5 * (4 * s * s * l + 2 * s**3)


@pytest.fixture
def small_strips(monkeypatch):
    """A sixteenth of the rows, so that a sixteenth of the sides is cut as often."""
    monkeypatch.setattr(
        kernels, "ROWS", {dtype: rows // 16 for dtype, rows in kernels.ROWS.items()}
    )
    monkeypatch.setattr(kernels, "HALF_PRECISION_ROWS", kernels.HALF_PRECISION_ROWS // 16)


@pytest.mark.usefixtures("small_strips")
@pytest.mark.parametrize(
    ("dtype", "shape", "coefficients", "steps", "share"),
    [
        # A lower share is an improvement, and wants to be written down here; a higher one is not.
        ("bfloat16", (768, 768), "polar_express", 5, 0.750),
        ("bfloat16", (768, 768), "tight", 4, 0.600),
        ("bfloat16", (768, 2048), "polar_express", 5, 0.628),
        ("bfloat16", (768, 2048), "tight", 4, 0.471),
        ("float32", (768, 768), "tight", 4, 0.578),
        ("float32", (2048, 768), "polar_express", 5, 0.525),
        ("float32", (2048, 768), "tight", 4, 0.451),
    ],
)
def test_a_factor_takes_this_share_of_the_quintics_operations(
    dtype, shape, coefficients, steps, share
):
    x = torch.randn([side // 16 for side in shape])
    chosen = {"method": "auto", "dtype": dtype}
    counted = operations(x, coefficients=coefficients, steps=steps, **chosen)
    assert counted / quintic(*sorted(x.shape)) == pytest.approx(share, abs=1e-3)
    direct = {"method": "newton_schulz", "dtype": dtype, "coefficients": "quintic", "steps": 5}
    assert operations(x, **direct) == quintic(*sorted(x.shape))


def test_without_mirroring_they_are_those_of_the_formulas(monkeypatch):
    monkeypatch.setattr(kernels, "strips_of", lambda A: 1)
    s, l = 32, 86  # noqa: E741
    chosen = {"coefficients": "tight", "steps": 4, "dtype": "bfloat16"}
    x = torch.randn(s, l)
    assert operations(x, method="newton_schulz", **chosen) == 4 * (4 * s * s * l + 2 * s**3)
    assert operations(x, method="gram", **chosen) == 2 * (4 * s * s * l + 10 * s**3)


def memory_of(step):
    """Bytes that a step allocates in all, and the most that it holds of them at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = [
        event.nbytes()
        for event in sorted(events, key=lambda event: event.start_ns())
        if event.name() == "[memory]"
    ]
    held, most = 0, 0
    for change in changes:
        held += change
        most = max(most, held)
    return sum(change for change in changes if change > 0), most


@pytest.mark.parametrize("count", [1, 4])
def test_a_step_holds_the_temporaries_of_one_matrix(count):
    matrices = [torch.nn.Parameter(torch.randn(768, 2048)) for _ in range(count)]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    settings = {"coefficients": "tight", "polar_steps": 4, "polar_dtype": "float32"}
    optimizer = Muon([{"params": matrices}], lr=0.1, **settings)
    optimizer.step()
    optimizer.step()
    allocated, most = memory_of(optimizer.step)
    size = matrices[0].numel() * 4
    # The filtered matrix, X, Y = QX and three eighths of their size for each product of a run, all
    # of them gone before the next matrix.
    assert 2 * size < most < 3.8 * size
    # Some three for the filter, X and Y, and as many again, of three eighths each, for 24 products.
    assert 6 * size * count < allocated < 14 * size * count
