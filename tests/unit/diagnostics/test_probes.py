"""Probes: what they read from noise, from a known signal, and from a real model."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_muon import create_muon_optimizer
from hf_muon import diagnostics as d
from hf_muon.config import MuonConfig
from hf_muon.diagnostics.gradients import muon_matrices, read_gradients
from hf_muon.diagnostics.readings import Flipped, balanced_signs
from hf_muon.diagnostics.replay import ema, stages
from hf_muon.diagnostics.report import Reading, Statistic

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


# --- real models ----------------------------------------------------------------------------------


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def text(count, seed=0):
    """Batches of sequences in which the next token follows from the last."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(64, (count, 4, 1), generator=generator)
    for ids in (starts + 3 * torch.arange(16)) % 64:
        yield {"input_ids": ids, "labels": ids}


def test_a_model_of_transformers_is_probed_by_layer(llama):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    llama(**next(text(1))).loss.backward()
    kept = {name: p.grad for name, p in llama.named_parameters()}
    copies = {name: g.clone() for name, g in kept.items()}
    report = d.stationary_probe(llama, text(16), layers=["q_proj", r"layers\.1\.mlp\.up"], flips=4)
    layers = list(dict.fromkeys(reading.layer for reading in report.readings))
    assert layers == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert report.readings[-1].shape == (48, 32)
    for name, p in llama.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is kept[name]
        assert torch.equal(p.grad, copies[name])


def test_every_matrix_that_muon_trains_is_probed_by_default(llama):
    names = set(muon_matrices(llama))
    assert len(names) == 14  # seven in each of two layers; neither embedding nor head
    assert {r.layer for r in d.stationary_probe(llama, text(4), flips=2).readings} == names


def test_matrices_inside_a_parameter_are_probed_one_by_one():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 9))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

    batches = list(torch.randn(8, 2, 6, 9))
    report = d.stationary_probe(
        Model(),
        batches,
        loss=lambda model, batch: (model.experts.gate_up_proj * batch).sum(),
        orders=("polar_only",),
        flips=2,
    )
    assert [r.layer for r in report.readings] == [
        "experts.gate_up_proj[0]",
        "experts.gate_up_proj[1]",
    ]
    for index, reading in enumerate(report.readings):
        steps = torch.stack(batches)[:, index]
        update = d.replay(steps[:4], "polar_only")[-1]
        expected = d.signal_alignment(update, steps[4:].mean(0)).item()
        assert reading.statistics["alignment"].value == pytest.approx(expected, rel=1e-4)


def test_a_trajectory_probe_slides_over_training(llama):
    optimizer = create_muon_optimizer(llama, lr=0.01, polar_method="svd")
    trajectory = d.TrajectoryProbe(llama, window=4, held_out=2, layers="layers.0.mlp.down")
    recorded = []
    for step, batch in enumerate(text(8)):
        llama(**batch).loss.backward()
        trajectory.record()
        recorded.append(llama.model.layers[0].mlp.down_proj.weight.grad.clone())
        assert trajectory.is_full == (step >= 5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the next gradient is written over this one
    reading = trajectory.report(orders=("pre_polar",), flips=4).readings[0]
    steps = torch.stack(recorded)
    update = d.replay(steps[2:6], "pre_polar")[-1]
    expected = d.signal_alignment(update, steps[6:].mean(0)).item()
    assert reading.statistics["alignment"].value == pytest.approx(expected, rel=1e-4)
    assert reading.layer == "model.layers.0.mlp.down_proj.weight"


def test_recording_does_not_change_the_training(llama):
    twin = LlamaForCausalLM(llama.config)
    twin.load_state_dict(llama.state_dict())
    trajectory = d.TrajectoryProbe(llama, window=2, held_out=2)
    for model in (llama, twin):
        optimizer = create_muon_optimizer(model, lr=0.01)
        for batch in text(4):
            model(**batch).loss.backward()
            if model is llama:
                trajectory.record()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, llama.parameters(), twin.parameters()))


def test_gradients_that_are_views_of_a_bucket_are_read_in_place():
    model = Linear(4, 6)
    bucket = torch.randn(2, 4, 6)
    model.hidden.weight.grad = bucket[1]
    read = read_gradients(muon_matrices(model))["hidden.weight"]
    assert torch.equal(read, bucket[1])
    assert read.data_ptr() != bucket[1].data_ptr()


def test_a_parameter_without_a_gradient_counts_as_zero(llama):
    llama.model.layers[0].mlp.up_proj.weight.grad = torch.ones(48, 32)
    read = read_gradients(muon_matrices(llama, "mlp.up_proj"))
    assert [gradient.sum().item() for gradient in read.values()] == [48 * 32, 0]


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


@pytest.mark.full
def test_the_example_of_the_documentation_prints_what_the_page_shows(capsys):
    root = Path(__file__).parents[3]
    page = (root / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    example, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.S).groups()
    exec(example, {})

    def rows(table):
        cells = [line.strip("│ ").split("│") for line in table.splitlines() if line.startswith("│")]
        return [([c.strip() for c in row[:4]], float(row[4].split()[0])) for row in cells]

    actual, shown = rows(capsys.readouterr().out), rows(printed)
    assert [labels for labels, _ in actual] == [labels for labels, _ in shown]
    # The text is a file of Python's, and training amplifies rounding.
    values = [value for _, value in actual]
    assert values == pytest.approx([value for _, value in shown], abs=0.15)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proxy": "heldout"}, "proxy='heldout'.*held_out, in_buffer, both"),
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
