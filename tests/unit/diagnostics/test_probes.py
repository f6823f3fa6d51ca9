"""Probes: what they read from noise and from a known signal, and how they say it."""

import json

import pytest
import torch
from torch import nn

from hf_muon import diagnostics as d
from hf_muon.config import MuonConfig
from hf_muon.diagnostics.probe_report import Reading, Statistic
from hf_muon.diagnostics.readings import Flipped, balanced_signs
from hf_muon.diagnostics.replay import ema, stages

ORDERS = ("pre_polar", "post_polar", "polar_only")


class Linear(nn.Module):
    """A model whose gradient on a batch is the batch."""

    def __init__(self, m, n):
        super().__init__()
        self.hidden = nn.Linear(n, m, bias=False)


def inner_product(model, batch):
    return (model.hidden.weight * batch).sum()


def probe(batches, **settings):
    model = Linear(*batches[0].shape)
    return d.stationary_probe(model, batches, loss=inner_product, **settings)


def noise(count, m=48, n=64):
    return list(torch.randn(count, m, n))


def spiked(count, strength, m=48, n=64):
    signal = torch.zeros(m, n)
    signal[0, 0] = strength
    return [signal + xi / m**0.5 for xi in noise(count, m, n)], signal


def test_a_probe_replays_any_rule():
    batches, _ = spiked(40, 3.0)
    settings = {"momentum_weights": (0.25, 0.75), "prefilter": "norm", "rescale": "rows"}
    report = probe(batches, orders=("pre_polar",), momenta=((0.5, 0.9),), settings=settings)
    [reading] = report.readings
    assert reading.momentum == pytest.approx(1 - 1 / (0.25 * 2 + 0.75 * 10))  # of the same mean age
    assert reading.flag != "as in noise"
    with pytest.raises(ValueError, match="momentum_weights"):
        probe(batches, momenta=(0.9,), settings={"momentum_weights": (0.5, 0.5)})


# --- noise ----------------------------------------------------------------------------------------


def test_in_pure_noise_the_held_out_proxy_reads_zero_and_is_flagged():
    report = probe(noise(64), momenta=(0.9, 0.95))
    assert [(r.order, r.momentum) for r in report.readings] == [
        ("pre_polar", 0.9),
        ("pre_polar", 0.95),
        ("post_polar", 0.9),
        ("post_polar", 0.95),
        ("polar_only", 0.0),
    ]
    for reading in report.readings:
        assert abs(reading.statistics["alignment"].value) < 0.05
        assert abs(reading.statistics["direction"].value) < 0.05
        assert reading.flag == "as in noise"


def test_in_pure_noise_the_in_buffer_proxy_reads_a_signal_and_is_flagged():
    report = probe(noise(64), proxy="in_buffer", nesterov=False)
    assert report.readings[0].statistics["alignment"].value > 0.8
    for reading in report.readings:
        alignment = reading.statistics["alignment"]
        assert alignment.value == pytest.approx(alignment.null, abs=0.05)
        assert "shared noise" in reading.flag
    assert report.flagged == report.readings


def test_false_alarms_are_rare():
    readings = [
        reading
        for seed in range(20)
        for reading in (torch.manual_seed(seed), probe(noise(32, 16, 24), proxy="both"))[1].readings
    ]
    # Three spreads of sixteen flips, on one side: 0.5 % of 120 readings.
    assert sum(not reading.flag for reading in readings) <= 3


# --- a signal -------------------------------------------------------------------------------------


def test_a_signal_stands_out_under_every_order():
    batches, _ = spiked(64, 2.0)
    for reading in probe(batches, proxy="both").readings:
        assert reading.flag == ""
        assert reading.statistics["sin_left"].stands_out


def test_held_out_readings_are_those_of_the_metrics():
    batches, _ = spiked(48, 2.0)
    gradients = torch.stack(batches)
    held_out = gradients[24:].mean(0)
    for reading in probe(batches, nesterov=False).readings:
        update = d.replay(gradients[:24], reading.order, reading.momentum, False)[-1]
        expected = d.signal_alignment(update, held_out).item()
        assert reading.statistics["alignment"].value == pytest.approx(expected, rel=1e-4)
        in_buffer = d.signal_alignment(update, gradients[:24].mean(0)).item()
        assert reading.statistics["alignment"].value != pytest.approx(in_buffer, rel=0.1)


def test_held_out_batches_may_be_given():
    batches, _ = spiked(48, 2.0)
    halves = probe(batches)
    given = probe(batches[:24], held_out=batches[24:])
    assert given.to_dict() == halves.to_dict()


def test_statistics_of_the_filter_output():
    batches, _ = spiked(64, 2.0)
    pre, post, alone = probe(batches, nesterov=False).readings
    gradients = torch.stack(batches[:32])
    average = list(ema(0.95)(gradients))[-1]
    outputs = (average, d.replay(gradients, "post_polar", nesterov=False)[-1], gradients[-1])
    for reading, output in zip((pre, post, alone), outputs, strict=True):
        statistics = reading.statistics
        assert statistics["gap"].value == pytest.approx(d.spectral_gap(output, 1).item(), rel=1e-4)
        effective_rank = d.effective_rank(output).item()
        assert statistics["effective_rank"].value == pytest.approx(effective_rank, rel=1e-4)
    # Filtered first, the spike is better seen than in one gradient.
    assert pre.statistics["sin_left"].value < 0.5 * alone.statistics["sin_left"].value


def test_probes_take_filters_of_ones_own():
    batches, _ = spiked(64, 2.0)
    plain = probe(batches, orders=("pre_polar",), momenta=(0.9,), nesterov=False)
    own = probe(batches, orders=("polar_only",), before=ema(0.9))
    values = [r.readings[0].statistics["alignment"].value for r in (plain, own)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    both = probe(batches, orders=("pre_polar",), momenta=(0.9,), nesterov=False, after=ema(0.5))
    assert both.readings[0].statistics["direction"].value > 0


# --- the null -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [6, 7])
def test_signs_are_balanced_and_the_first_row_is_the_original(steps):
    signs = balanced_signs(steps, 50, torch.Generator().manual_seed(0))
    assert (signs[0] == 1).all()
    assert (signs.abs() == 1).all()
    assert (signs[1:].sum(1).abs() == steps % 2).all()
    assert abs(signs[1:].mean()) < 0.2
    assert len(signs.unique(dim=0)) > 10


def test_the_null_is_the_statistic_on_flipped_copies_without_the_original():
    batches, _ = spiked(16, 2.0)
    statistic = probe(batches, orders=("polar_only",), flips=5).readings[0].statistics["alignment"]
    generator = torch.Generator().manual_seed(0)
    signs, other_signs = (balanced_signs(8, 5, generator)[1:] for _ in range(2))
    gradients, update = torch.stack(batches), d.replay(batches[:8], "polar_only")[-1]
    signals = torch.einsum("fk,kmn->fmn", other_signs, gradients[8:]) / 8
    null = d.signal_alignment(signs[:, -1, None, None] * update, signals)
    assert statistic.null == pytest.approx(null.mean().item(), rel=1e-3)
    assert statistic.spread == pytest.approx(null.std().item(), rel=1e-3)


@pytest.mark.parametrize("filters", [{}, {"before": ema(0.5)}, {"after": ema(0.5)}])
@pytest.mark.parametrize("order", ORDERS)
def test_flipped_copies_are_replays_of_flipped_gradients(order, filters):
    gradients = torch.randn(6, 4, 5)
    signs = balanced_signs(6, 3, torch.Generator().manual_seed(0))
    config = MuonConfig(order=order, momentum=0.9, polar_method="svd")
    _, updates = Flipped(gradients, signs).last_step(stages(config, **filters))
    for row, update in zip(signs, updates, strict=True):
        expected = d.replay(row[:, None, None] * gradients, order, 0.9, **filters)[-1]
        torch.testing.assert_close(update, expected)


# --- the report -----------------------------------------------------------------------------------


def test_the_report_prints_every_number_beside_its_null():
    report = probe(noise(8), flips=2)
    table = report.table("alignment", "gap")
    assert "hidden.weight" in table
    assert "as in noise" in table
    for reading in report.readings:
        assert str(reading.statistics["alignment"]) in table
        assert str(reading.statistics["gap"]) in table
    assert "sin_left" not in table
    assert "sin_left" in report.table()


def test_a_number_stands_out_beyond_three_spreads_of_its_null():
    assert Statistic(0.5, 0.1, 0.1).stands_out
    assert Statistic(-0.5, 0.1, 0.1).stands_out
    assert not Statistic(0.35, 0.1, 0.1).stands_out
    assert not Statistic(1 + 1e-6, 1.0, 1e-8).stands_out  # signs change nothing: rounding
    assert not Statistic(0.5, 0.1, float("nan")).stands_out


def test_an_alignment_below_the_null_is_no_evidence_of_a_signal():
    def flag(value):
        statistics = {"alignment": Statistic(value, 0.1, 0.1)}
        return Reading("w", (2, 3), "pre_polar", 0.9, "held_out", statistics).flag

    assert flag(0.5) == ""
    assert flag(-0.5) == "as in noise"


def test_the_report_is_plain_data():
    data = json.loads(json.dumps(probe(noise(8), flips=2).to_dict()))
    first = data["readings"][0]
    assert first["layer"] == "hidden.weight"
    assert first["shape"] == [48, 64]
    assert set(first["statistics"]["alignment"]) == {"value", "null", "spread", "stands_out"}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proxy": "heldout"}, "proxy='heldout'.*'held_out', 'in_buffer', 'both'"),
        ({"orders": ("pre",)}, "order='pre'"),
        ({"orders": ()}, r"orders=\(\)"),
        ({"momenta": (1.0,)}, "momentum=1.0"),
        ({"flips": 1}, "flips=1"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 49}, r"rank=49.*1 … 48"),
        ({"layers": "hiden"}, "'hiden'.*hidden.weight"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        probe(noise(8), **settings)


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match="2 gradients to replay and 1 held out"):
        probe(noise(3))


def test_a_bad_gradient_is_named_and_the_model_is_left_as_it_was():
    model = Linear(4, 6)
    with pytest.raises(FloatingPointError, match="Batch 1 gives hidden"):
        d.stationary_probe(
            model, [torch.ones(4, 6), torch.full((4, 6), torch.nan)], loss=inner_product
        )
    assert model.hidden.weight.grad is None


def test_a_trajectory_probe_says_what_it_lacks():
    model = Linear(4, 6)
    with pytest.raises(ValueError, match="window=1"):
        d.TrajectoryProbe(model, window=1)
    trajectory = d.TrajectoryProbe(model, window=2, held_out=2)
    with pytest.raises(RuntimeError, match="No matrix has a gradient"):
        trajectory.record()
    with pytest.raises(RuntimeError, match=r"0 steps are recorded.*= 4"):
        trajectory.report()
