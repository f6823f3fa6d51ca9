"""What a polar factor costs, counted: operations and memory, not time."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_muon import Muon
from hf_muon.polar import Workspace, orthogonalize
from hf_muon.polar.kernels import halves


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
    monkeypatch.setattr(halves, "ROWS", {dtype: rows // 16 for dtype, rows in halves.ROWS.items()})
    monkeypatch.setattr(halves, "HALF_PRECISION_ROWS", halves.HALF_PRECISION_ROWS // 16)


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
    monkeypatch.setattr(halves, "strips_of", lambda A: 1)
    s, l = 32, 86  # noqa: E741
    chosen = {"coefficients": "tight", "steps": 4, "dtype": "bfloat16"}
    x = torch.randn(s, l)
    assert operations(x, method="newton_schulz", **chosen) == 4 * (4 * s * s * l + 2 * s**3)
    assert operations(x, method="gram", **chosen) == 2 * (4 * s * s * l + 10 * s**3)


def allocations_of(step):
    """The sizes of what a step allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize("order", ["pre_polar", "post_polar", "polar_only"])
def test_a_step_allocates_no_more_than_a_megabyte_at_once_after_the_first(order, monkeypatch):
    shapes = [(768, 2048), (1024, 768), (600, 600), (600, 600)]
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    settings = {"coefficients": "tight", "polar_steps": 4, "polar_dtype": "float32"}
    optimizer = Muon([{"params": matrices}], lr=0.1, order=order, **settings)
    optimizer.step()
    largest = matrices[0].numel() * 4
    # The matrix, its successor and four squares; the next matrices are smaller.
    assert optimizer._workspace.nbytes == (2 * 768 * 2048 + 4 * 768 * 768) * 4
    assert max(allocations_of(optimizer.step)) <= 2**20
    assert optimizer._workspace.nbytes == (2 * 768 * 2048 + 4 * 768 * 768) * 4

    def anew(self, name, shape, dtype, device):
        return torch.empty(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(Workspace, "empty", anew)
    assert max(allocations_of(optimizer.step)) >= largest
