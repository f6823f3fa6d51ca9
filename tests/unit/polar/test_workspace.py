"""Memory that is used again."""

from __future__ import annotations

import torch

from hf_muon.polar import Workspace, orthogonalize

CPU = torch.device("cpu")


def test_a_name_has_the_same_memory_at_every_call():
    workspace = Workspace()
    first = workspace.empty("a", (4, 6), torch.float32, CPU)
    again = workspace.empty("a", (3, 5), torch.float32, CPU)
    assert first.data_ptr() == again.data_ptr()
    assert (first.shape, again.shape) == ((4, 6), (3, 5))
    assert again.is_contiguous()
    for other in [("b", torch.float32), ("a", torch.float64)]:
        assert workspace.empty(other[0], (3, 5), other[1], CPU).data_ptr() != first.data_ptr()
    assert workspace.nbytes == 4 * 24 + 4 * 15 + 8 * 15
    workspace.empty("a", (5, 6), torch.float32, CPU)
    assert workspace.nbytes == 4 * 30 + 4 * 15 + 8 * 15


def test_elsewhere_the_allocator_keeps_what_was_freed():
    workspace = Workspace()
    assert workspace.empty("a", (2, 3), torch.float32, torch.device("meta")).shape == (2, 3)
    assert workspace.nbytes == 0


def test_results_do_not_depend_on_what_was_computed_before():
    workspace = Workspace()
    chosen = {"coefficients": "tight", "steps": 4, "dtype": "float32"}
    for method in ("newton_schulz", "gram", "svd"):
        for shape in [(40, 64), (64, 40), (3, 20, 50), (3, 50, 20), (1, 9), (30, 30)]:
            x = torch.randn(shape)
            expected = orthogonalize(x, method=method, **chosen)
            result = x.clone()
            found = orthogonalize(result, method=method, **chosen, out=result, workspace=workspace)
            assert found is result
            assert torch.equal(result, expected)
            assert not torch.equal(result, x)


def test_the_result_is_written_in_the_dtype_of_its_place():
    x = torch.randn(20, 50).bfloat16()
    chosen = {"method": "gram", "coefficients": "tight", "steps": 4, "dtype": "float32"}
    expected = orthogonalize(x, **chosen)
    place = torch.empty_like(x)
    assert torch.equal(orthogonalize(x, **chosen, out=place), expected.bfloat16())
    assert not torch.equal(place.float(), expected)
