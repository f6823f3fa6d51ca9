"""Robust means over ranks, against NumPy in float64, and what they withstand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hf_muon
import hf_muon.auto
from hf_muon.distributed.robust import METHODS, Robust, make_robust, robust_mean

RANKS = (2, 3, 4, 5, 8, 16, 17, 33)  # on both sides of where sorting changes


def oracle(values, method, trim):
    values = values.double().numpy()
    if method == "median":
        return np.median(values, axis=0)
    if method == "multi_krum":
        return values[closest(values, trim)].mean(0)
    return np.sort(values, axis=0)[trim : len(values) - trim].mean(0)


def closest(values, trim):
    """The ranks that Multi-Krum keeps, as its authors define it."""
    scores = []
    for one in values:
        to_others = sorted(float(((one - other) ** 2).sum()) for other in values)[1:]
        scores.append(sum(to_others[: len(values) - trim - 2]))
    return sorted(sorted(range(len(values)), key=scores.__getitem__)[: len(values) - trim])


def most(method, ranks):
    """How many bad ranks a method withstands, for ``trim``."""
    return (ranks - 2) // 2 if method == "multi_krum" else (ranks - 1) // 2


def trims(method, ranks):
    """Which ``trim`` a method takes with so many ranks; the median takes any, and ignores it."""
    return range(1, 2 if method == "median" else most(method, ranks) + 1)


@pytest.mark.parametrize(
    ("method", "ranks"), [(m, ranks) for m in METHODS for ranks in RANKS if trims(m, ranks)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_numpy(ranks, method, dtype):
    torch.manual_seed(0)
    values = torch.randn(ranks, 7, 5).to(dtype)
    for trim in trims(method, ranks):
        found = robust_mean(values, method, trim)
        assert found.dtype == dtype
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(
            found.double(), oracle(values, method, trim), rtol=2 * eps, atol=4 * eps
        )


def test_the_input_is_left_as_it_was():
    values = torch.randn(4, 6)
    before = values.clone()
    robust_mean(values)
    assert torch.equal(values, before)


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 9), st.integers(0, 2**31), st.sampled_from(METHODS), st.data())
def test_bad_ranks_cannot_move_it_beyond_the_honest_ones(ranks, seed, method, data):
    generator = torch.Generator().manual_seed(seed)
    honest = torch.randn(ranks, 20, generator=generator)
    trim = data.draw(st.integers(1, most(method, ranks)))
    bad = Robust(method, trim).left_out(ranks)
    values = honest.clone()
    poison = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30]
    for rank in range(bad):
        values[rank] = data.draw(st.sampled_from(poison))
    found = robust_mean(values, method, trim)
    rest = honest[bad:]
    assert (found >= rest.min(0).values).all()
    assert (found <= rest.max(0).values).all()


def test_order_of_ranks_does_not_matter():
    values = torch.randn(5, 40)
    shuffled = values[torch.tensor([3, 0, 4, 1, 2])]
    for method in METHODS:  # Multi-Krum adds the same ranks, in the order of their numbers
        found, other = robust_mean(values, method), robust_mean(shuffled, method)
        torch.testing.assert_close(found, other, rtol=0, atol=5e-7 * (method == "multi_krum"))


@pytest.mark.parametrize("size", [1.0, 1e25, 1e-25])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, 1e6, -10.0])
def test_multi_krum_leaves_out_the_first_rank_at_any_size(size, bad):
    torch.manual_seed(0)
    values = size * torch.randn(5, 40)
    values[0] *= bad
    found, expected = robust_mean(values, "multi_krum"), values[1:].double().mean(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * size)


def test_multi_krum_leaves_out_what_is_not_finite_before_what_is_far():
    values = torch.randn(7, 40)
    values[1, 3], values[6] = torch.nan, 1e20
    assert robust_mean(values, "multi_krum", trim=2).abs().max() < 10
    assert robust_mean(values, "multi_krum").isfinite().all()  # one too many: the far one stays


def test_multi_krum_takes_single_values():
    assert robust_mean(torch.tensor([1.0, 2.0, 3.0, 100.0]), "multi_krum") == 2.0


def test_bad_ranks_that_agree_do_not_win():
    """With fewer ranks they would, which is refused."""
    torch.manual_seed(0)
    values = torch.randn(6, 40)
    values[:2] = 1e6
    assert robust_mean(values, "multi_krum", trim=2).abs().max() < 10


def test_multi_krum_keeps_what_one_honest_rank_alone_has_to_say():
    """Negative control: the median forgets it."""
    torch.manual_seed(0)
    values = 0.1 * torch.randn(5, 40)
    values[2, 7] = 3.0
    values[4] *= -10
    honest = values[:4, 7].mean()
    assert robust_mean(values, "multi_krum")[7].item() == pytest.approx(honest.item(), abs=1e-6)
    assert robust_mean(values, "median")[7] < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_more_bad_ranks_than_are_left_out_show(method):
    values = torch.randn(4, 6)
    values[:2] = torch.nan
    assert not robust_mean(values, method).isfinite().any()  # and the optimizer stops
    values[1] = 0.0
    assert robust_mean(values, method).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ({"method": "mean"}, 4, r"method='mean' is not one of median, trimmed_mean"),
        ({"trim": 0}, 4, "a whole number ≥ 1"),
        ({"trim": True}, 4, "a whole number ≥ 1"),
        ({"trim": 1.5}, 4, "a whole number ≥ 1"),
        ({"method": "trimmed_mean", "trim": 2}, 4, "trim=2 leaves none of 4 ranks"),
        ({"method": "trimmed_mean"}, 2, "trim=1 leaves none of 2 ranks"),
        ({"method": "multi_krum"}, 3, "multi_krum' with trim=1 needs 4 ranks or more, not 3"),
        ({"method": "multi_krum", "trim": 2}, 5, "trim=2 needs 6 ranks or more, not 5"),
        ({}, 1, "There is one process"),
    ],
)
def test_wrong_settings_are_refused(settings, ranks, message):
    with pytest.raises(ValueError, match=message):
        Robust(**settings).left_out(ranks)


def test_a_model_without_ddp_is_refused_with_the_reason():
    with pytest.raises(TypeError, match="Linear is not wrapped by DistributedDataParallel"):
        make_robust(nn.Linear(2, 2), Robust())


def test_the_callback_is_offered_and_checks_its_settings():
    with pytest.raises(ValueError, match="is not one of"):
        hf_muon.RobustAggregation("mode")
    assert "RobustAggregation" in hf_muon.__all__
    with pytest.raises(AttributeError, match="no attribute 'Robust'"):
        _ = hf_muon.Robust


def test_one_process_is_refused_when_training_begins(tmp_path):
    from tests.integration.tiny import trained

    with pytest.raises(ValueError, match="There is one process"):
        trained(tmp_path, trainer_settings={"callbacks": [hf_muon.RobustAggregation()]})
