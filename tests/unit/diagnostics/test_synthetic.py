"""Synthetic gradients have the truth they say, and averages of them what the theory says."""

import itertools
import math
from functools import partial

import pytest
import torch

from hf_muon import diagnostics as d
from hf_muon import polar_factor
from tests.reference.spectra import Spike
from tests.unit.diagnostics.streams import last_averages, momentum_of

NOISES = ("gaussian", "student_t", "arch")


def noise_of(**settings):
    """Pure noise, (steps, m, n)."""
    return torch.stack([o.gradient for o in d.spiked_stream(strengths=[], **settings)])


# --- the stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (4, 4), (3, 1)])
def test_the_signal_is_known(m, n, noise):
    strengths = [3.0, 2.0, 0.5][: min(m, n)]
    for o in d.spiked_stream(m, n, strengths, steps=3, noise=noise, batch=(2,), sigma=0.0):
        assert o.gradient.shape == o.signal.shape == (2, m, n)
        torch.testing.assert_close(o.gradient, o.signal)
        torch.testing.assert_close(o.signal, (o.left * torch.tensor(strengths)) @ o.right.mT)
        for basis in (o.left, o.right):
            identity = torch.eye(len(strengths)).expand(2, -1, -1)
            torch.testing.assert_close(basis.mT @ basis, identity)


def test_copies_in_a_batch_have_directions_of_their_own():
    o = next(d.spiked_stream(6, 9, [1.0], steps=1, batch=(2,)))
    assert not torch.allclose(o.signal[0].abs(), o.signal[1].abs(), atol=1e-3)


@pytest.mark.parametrize("noise", NOISES)
def test_a_seed_fixes_the_stream(noise):
    settings = {"m": 6, "n": 9, "steps": 4, "noise": noise}
    first, again, other = (noise_of(seed=seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("noise", "settings"),
    [
        ("gaussian", {}),
        ("student_t", {"degrees_of_freedom": 5.0}),
        ("arch", {"arch": 0.3}),
    ],
)
def test_noise_has_the_asked_deviation_and_is_white(noise, settings):
    x = noise_of(m=100, n=100, steps=50, noise=noise, sigma=0.7, **settings).double()
    # 500,000 entries of kurtosis up to 9: deviations of the mean 0.1 %, of the variance 0.4 %.
    assert x.mean().abs() < 0.005
    assert x.std().item() == pytest.approx(0.7, rel=0.01)
    assert (x[1:] * x[:-1]).mean().abs() < 0.005
    assert (x[:, 1:] * x[:, :-1]).mean().abs() < 0.005


def test_arch_variance_follows_the_last_square_and_is_stationary_from_the_start():
    x = noise_of(m=200, n=200, steps=6, noise="arch", arch=0.3)
    for step in x:
        assert step.var().item() == pytest.approx(1, abs=0.05)  # kurtosis 3.7 or less: sd 0.008
    squares = x.square().flatten(1)
    last, now = squares[:-1].flatten(), squares[1:].flatten()
    slope = torch.cov(torch.stack([last, now]))[0, 1] / last.var()
    assert slope.item() == pytest.approx(0.3, abs=0.05)
    control = noise_of(m=200, n=200, steps=6).square().flatten(1)
    assert torch.corrcoef(control)[0, 1].abs() < 0.03  # 40,000 pairs: sd 0.005


def test_student_t_has_its_tails():
    x = noise_of(m=300, n=300, steps=10, noise="student_t", degrees_of_freedom=2.0)
    # P(|t₂| > c) = 1 − c/√(2 + c²); at ν = 2 the scale is left alone. 900,000 entries.
    for c in (1.0, 10.0, 100.0):
        tail = 1 - c / math.sqrt(2 + c * c)
        expected = 900_000 * tail
        count = (x.abs() > c).sum().item()
        assert count == pytest.approx(expected, abs=5 * math.sqrt(expected))


def test_directions_drift_by_the_asked_angle():
    steps = list(d.spiked_stream(8, 12, [2.0, 1.0], steps=4, drift=0.1))
    for t, o in enumerate(steps):
        angles = d.principal_angles(o.signal, steps[0].signal, 2)
        torch.testing.assert_close(angles.left, torch.full((2,), 0.1 * t), atol=1e-4, rtol=0)
        torch.testing.assert_close(angles.right, torch.full((2,), 0.1 * t), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.linalg.svdvals(o.signal)[:2], torch.tensor([2.0, 1.0]))
    fixed = list(d.spiked_stream(8, 12, [2.0, 1.0], steps=4))
    assert torch.equal(fixed[0].signal, fixed[-1].signal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": "cauchy"}, "noise='cauchy'.*gaussian, student_t, arch"),
        ({"strengths": [1.0] * 5}, r"5 strengths in 4 by 6.*≥ 5"),
        ({"strengths": [1.0] * 3, "drift": 0.1}, r"3 strengths in 4 by 6.*≥ 6"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"arch": 1.0}, "arch=1.0.*0 ≤ arch < 1"),
        ({"degrees_of_freedom": 0}, "degrees_of_freedom=0"),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16"),
    ],
)
def test_wrong_streams_are_refused_before_the_first_step(changes, message):
    settings = {"m": 4, "n": 6, "strengths": [1.0], "steps": 1} | changes
    with pytest.raises(ValueError, match=message):
        d.spiked_stream(**settings)


# --- what the theory says of averages -------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "theta", "window"),
    [(128, 128, 2.0, 20), (128, 128, 4.0, 10), (256, 128, 1.8, 10), (128, 256, 2.4, 10)],
)
def test_averages_of_a_spike_agree_with_the_closed_forms(m, n, theta, window):
    strength = theta / math.sqrt(2 * window - 1)
    theory = Spike(m, n, strength, window)
    stream = d.spiked_stream(m, n, [strength], steps=10 * window, sigma=m**-0.5, batch=(40,))
    averages, last = last_averages(stream, [window])
    M = averages[window]
    angles = d.principal_angles(M, last.signal, 1)
    actual = {
        "top": torch.linalg.svdvals(M)[:, 0],
        "sin_left": angles.sin_left,
        "sin_right": angles.sin_right,
        "alignment": d.signal_alignment(M, last.signal, 1),
    }
    # One draw scatters by 7 %, the mean of 40 by 1.1 %; the limits are for infinite m and n.
    for name, values in actual.items():
        assert values.mean().item() == pytest.approx(getattr(theory, name), rel=0.03), name
    assert torch.linalg.svdvals(M)[:, 1].mean().item() == pytest.approx(theory.edge, rel=0.03)
    wrong_window = Spike(m, n, strength, window + 2)
    assert actual["sin_left"].mean().item() != pytest.approx(wrong_window.sin_left, rel=0.03)


def test_a_spike_below_the_threshold_stays_invisible():
    window, m = 10, 128
    strength = 0.5 / math.sqrt(2 * window - 1)
    assert not Spike(m, m, strength, window).is_visible
    stream = d.spiked_stream(m, m, [strength], steps=10 * window, sigma=m**-0.5, batch=(16,))
    averages, last = last_averages(stream, [window])
    assert d.principal_angles(averages[window], last.signal, 1).sin_left.mean() > 0.9


@pytest.mark.parametrize("noise", ["gaussian", "arch"])
def test_an_ema_suppresses_white_noise_by_the_root_of_2T_minus_1(noise):
    windows = (1, 5, 20)
    stream = d.spiked_stream(64, 96, [], steps=200, noise=noise, batch=(16,))
    averages, last = last_averages(stream, windows)
    for window in windows:
        ratio = d.noise_suppression(last.gradient, averages[window]).square().mean().sqrt()
        # 98,304 entries: each norm is known to 0.3 %.
        assert ratio.item() == pytest.approx(math.sqrt(2 * window - 1), rel=0.015)


def log_log_slope(x, y):
    x, y = torch.tensor(x).log(), torch.tensor(y).log()
    return torch.cov(torch.stack([x, y]))[0, 1].item() / x.var().item()


def test_noise_and_angles_fall_with_slope_one_half():
    windows = (5, 10, 20, 40)
    stream = d.spiked_stream(64, 48, [2.0], steps=400, sigma=64**-0.5, batch=(16,))
    averages, last = last_averages(stream, windows)
    spectra = {w: torch.linalg.svdvals(M).mean(0) for w, M in averages.items()}
    angles = {w: d.principal_angles(M, last.signal, 1) for w, M in averages.items()}
    curves = {
        "second": [spectra[w][1].item() for w in windows],
        "last": [spectra[w][-1].item() for w in windows],
        "sin_left": [angles[w].sin_left.mean().item() for w in windows],
        "sin_right": [angles[w].sin_right.mean().item() for w in windows],
    }
    lengths = [2.0 * w - 1 for w in windows]
    for name, curve in curves.items():
        assert log_log_slope(lengths, curve) == pytest.approx(-0.5, abs=0.1), name
    assert log_log_slope(lengths, [spectra[w][0].item() for w in windows]) > -0.1  # the signal


def arch_spectra(momenta, *, steps, seeds):
    windows = [1 / (1 - beta) for beta in momenta]
    stream = d.spiked_stream(
        100, 100, [12.0, 8.0, 5.0], steps=steps, noise="arch", arch=0.3, batch=(seeds,)
    )
    averages, _ = last_averages(stream, windows)
    means = (torch.linalg.svdvals(averages[w]).mean(0) for w in windows)
    return dict(zip(momenta, means, strict=True))


# A published grid: 100 by 100, entries of deviation 1, β = 0.95.
ARCH_AT_095 = [12.22, 8.25, 5.50, 3.09]


def test_momentum_lifts_three_signals_out_of_arch_noise():
    sigma = arch_spectra([0.95], steps=200, seeds=32)[0.95]
    assert sigma[:4].tolist() == pytest.approx(ARCH_AT_095, rel=0.03)


@pytest.mark.full
def test_the_arch_grid_over_a_thousand_steps():
    momenta = [0.5, 0.9, 0.95, 0.98]
    spectra = arch_spectra(momenta, steps=1000, seeds=32)
    assert spectra[0.95][:4].tolist() == pytest.approx(ARCH_AT_095, rel=0.03)
    for beta in momenta:
        # ARCH noise is white, so the closed forms for entries of deviation 1 hold: λ·√m⁻¹.
        theory = [Spike(100, 100, s / 10, 1 / (1 - beta)) for s in (12.0, 8.0, 5.0)]
        visible = [spike for spike in theory if spike.is_visible]
        for index, spike in enumerate(visible):
            if spike.theta > 2:  # 2γ^¼: nearer to the threshold the limits need larger matrices
                expected = 10 * spike.top
                assert spectra[beta][index].item() == pytest.approx(expected, rel=0.03)
        # The largest of the noise lies below the edge by the Tracy-Widom shift, 2 % at m = 100,
        # and the spikes have pushed it down.
        largest_noise = spectra[beta][len(visible)].item()
        assert largest_noise == pytest.approx(10 * theory[0].edge, rel=0.05)
    assert spectra[0.5][:4].tolist() != pytest.approx(ARCH_AT_095, rel=0.03)


def test_clipping_entries_restores_momentum_under_infinite_variance():
    """A rare huge entry owns the average; cut to size it is one entry among many."""
    settings = {"noise": "student_t", "degrees_of_freedom": 1.5, "batch": (8,)}
    observed = list(d.spiked_stream(48, 48, [4.0], steps=100, **settings))
    gradients, signal = torch.stack([o.gradient for o in observed]), observed[-1].signal

    def alignment(before):
        update = d.replay(gradients, "pre_polar", 0.95, False, before=before)[-1]
        return d.signal_alignment(update, signal).mean().item()

    clipped = alignment(partial(map, partial(torch.clamp, min=-3.0, max=3.0)))
    assert clipped > 0.8
    assert alignment(None) < 0.6 * clipped


def test_a_turning_signal_has_a_best_window():
    windows = (2, 32, 128)
    stream = d.spiked_stream(48, 48, [0.5], steps=400, sigma=48**-0.5, drift=0.01, batch=(8,))
    averages, last = last_averages(stream, windows)
    alignments = [d.signal_alignment(averages[w], last.signal, 1).mean().item() for w in windows]
    assert alignments[1] > alignments[0] + 0.05
    assert alignments[1] > alignments[2] + 0.05


# --- the order ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned():
    """Alignments (seeds,) of each order at the last step by window; of polar_only at every step."""
    torch.set_num_threads(1)
    windows = (2, 5, 10)
    observed = list(d.spiked_stream(32, 48, [0.4], steps=100, sigma=32**-0.5, batch=(24,)))
    gradients, S = torch.stack([o.gradient for o in observed]), observed[-1].signal
    averages, _ = last_averages(observed, windows)
    post = [
        d.replay(gradients[-10 * w :], "post_polar", momentum_of(w), nesterov=False)[-1]
        for w in windows
    ]
    return {
        "windows": windows,
        "polar_only": d.signal_alignment(d.replay(gradients, "polar_only"), S),
        "pre_polar": [
            d.signal_alignment(polar_factor(averages[w], method="svd"), S) for w in windows
        ],
        "post_polar": [d.signal_alignment(update, S) for update in post],
        "post_direction": [d.direction_alignment(update, S) for update in post],
    }


def test_averaging_polar_factors_does_not_change_their_mean_alignment(aligned):
    """post_polar is linear in O(G), so only its noise falls with T."""
    for window, values in zip(aligned["windows"], aligned["post_polar"], strict=True):
        # An EMA over ten windows sums to 1 − e⁻¹⁰. Each seed is its own control.
        assert standard_errors(values - aligned["polar_only"][-10 * window :].mean(0)) <= 3
    for values in aligned["pre_polar"]:
        assert standard_errors(values - aligned["polar_only"].mean(0)) > 3


def standard_errors(differences):
    """How far the mean is from zero, in its standard errors."""
    return differences.mean().abs() / (differences.std() / math.sqrt(len(differences)))


def test_averaging_gradients_raises_the_alignment(aligned):
    means = [values.mean().item() for values in aligned["pre_polar"]]
    assert all(later > earlier * 1.1 for earlier, later in itertools.pairwise(means))
    assert means[0] > aligned["polar_only"].mean() * 1.1


def test_the_direction_of_averaged_polar_factors_does_improve(aligned):
    means = [values.mean().item() for values in aligned["post_direction"]]
    assert all(later > earlier * 1.1 for earlier, later in itertools.pairwise(means))


# --- matrix sensing -------------------------------------------------------------------------------


def test_polar_steps_find_a_flatter_solution_than_gradient_steps_of_the_same_norm():
    for rank, measurements in ((1, 96), (2, 128), (8, 160)):
        found = d.matrix_sensing(16, 16, measurements, rank=rank, steps=300, batch=(8,))
        for descent in (found.polar, found.gradient):
            assert descent.losses.shape == (301, 8)
            assert (descent.losses[-1] < 1e-3 * descent.losses[0]).all()
        polar, gradient = (
            d.effective_rank(descent.weight) for descent in (found.polar, found.gradient)
        )
        assert (polar > 1.2 * gradient).all()


def test_matrix_sensing_measures_the_truth():
    found = d.matrix_sensing(6, 9, 20, rank=2, steps=1, batch=(3,), dtype=torch.float64)
    expected = torch.einsum("bpmn,bmn->bp", found.operators, found.truth)
    torch.testing.assert_close(found.targets, expected)
    torch.testing.assert_close(found.truth.norm(dim=(-2, -1)), torch.ones(3, dtype=torch.float64))
    assert (torch.linalg.matrix_rank(found.truth) == 2).all()
    torch.testing.assert_close(found.polar.losses[0], found.targets.square().mean(-1) / 2)


def test_both_descents_take_steps_of_one_norm():
    found = d.matrix_sensing(6, 9, 20, steps=1, lr=0.1)
    # One step from zero at rate 0.1: ‖W‖ = 0.1·√min(m, n).
    assert found.polar.weight.norm().item() == pytest.approx(0.1 * math.sqrt(6))
    assert found.gradient.weight.norm().item() == pytest.approx(0.1 * math.sqrt(6))
    assert not torch.allclose(found.polar.weight, found.gradient.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measurements": 54}, r"measurements=54.*1 … 53"),
        ({"rank": 7}, r"rank=7.*1 … 6"),
        ({"lr": 0.0}, "lr=0.0"),
    ],
)
def test_wrong_sensing_problems_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        d.matrix_sensing(**{"m": 6, "n": 9, "measurements": 20} | changes)
