"""What a run says of the next one: the criterion by hand, patterns that match what they name."""

import math
import re

import pytest
import torch

from hf_muon import MuonConfig
from hf_muon import diagnostics as d
from hf_muon.diagnostics.activations import rank_of_rows
from hf_muon.diagnostics.advice import smallest_window
from hf_muon.diagnostics.observed import (
    euclidean_parameters,
    observe,
    patterns_of,
)


def sample(layer, step=1, **values):
    given = {"gradient_nuclear_rank": 3.0, "input_stable_rank": 2.0, **values}
    return {"step": step, "layer": layer, **{k: v for k, v in given.items() if v is not None}}


@pytest.mark.parametrize(
    ("singular_values", "inputs", "spectral"),
    [
        # (3 + 1)²/(9 + 1) = 1.6 against (4 + 1)/4 = 1.25.
        ((3.0, 1.0), (2.0, 1.0), True),
        # 1.6 against (1 + 1)/1 = 2.
        ((3.0, 1.0), (1.0, 1.0), False),
        # 2 against 2: a tie goes to the spectral step.
        ((1.0, 1.0), (1.0, 1.0), True),
    ],
)
def test_the_criterion_by_hand(singular_values, inputs, spectral):
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))
    G = Q @ torch.diag(torch.tensor(singular_values, dtype=torch.float64)) @ V.T
    A = Q @ torch.diag(torch.tensor(inputs, dtype=torch.float64)) @ V.T
    nuclear = sum(singular_values) ** 2 / sum(s**2 for s in singular_values)
    stable = sum(s**2 for s in inputs) / max(inputs) ** 2
    assert d.nuclear_rank(G).item() == pytest.approx(nuclear)
    assert rank_of_rows(A) == pytest.approx(stable)
    # Without what rounding does to a tie.
    (found,) = observe([sample("w", gradient_nuclear_rank=nuclear, input_stable_rank=stable)])
    assert found.spectral is spectral


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (16, 16)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_rank_of_rows_is_the_stable_rank(shape, scale):
    A = torch.randn(shape) * scale
    assert rank_of_rows(A) == pytest.approx(d.stable_rank(A.double()).item(), rel=1e-9)
    assert rank_of_rows(A.bfloat16()) == pytest.approx(d.stable_rank(A.bfloat16()).item(), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_rows_without_a_rank_have_none(value):
    assert rank_of_rows(torch.full((3, 4), value)) is None


def test_the_earlier_half_of_the_samples_does_not_count():
    values = [100.0, 100.0, 4.0, 2.0, 3.0]
    records = [sample("w", i, gradient_nuclear_rank=v) for i, v in enumerate(values)]
    (found,) = observe(records)
    assert (found.samples, found.nuclear_rank, found.ratio) == (3, 3.0, 1.5)


def test_noise_over_signal_is_a_ratio_of_sums():
    powers = [{"noise_power": 6.0, "signal_power": 4.0}, {"noise_power": 2.0, "signal_power": -2.0}]
    records = [sample("w", 0), *(sample("w", i + 1, **p) for i, p in enumerate(powers))]
    assert observe(records)[0].noise_to_signal == 4.0
    assert observe([sample("w", noise_power=1.0, signal_power=-1.0)])[0].noise_to_signal is None


def test_momentum_is_that_of_the_smallest_window():
    window = smallest_window(0.5, 0.1, (64, 64))  # (1 + 0.01·64/0.25)/2 = 1.78
    (found,) = observe([sample("w", t_min=window, visible_rank=2.0)])
    assert window == pytest.approx(1.78)
    assert found.momentum == pytest.approx(1 - 1 / 1.78)
    assert observe([sample("w", t_min=0.6)])[0].momentum == 0.0
    assert observe([sample("w")])[0].momentum is None


def test_a_layer_whose_inputs_are_not_known_is_left_with_muon():
    records = [
        sample("a.weight", input_stable_rank=None),
        sample("b.weight", input_stable_rank=9.0),
    ]
    layers = observe(records)
    assert [one.spectral for one in layers] == [None, False]
    assert euclidean_parameters(layers) == ["b.weight"]


def test_a_fused_parameter_goes_as_a_whole():
    high = {"input_stable_rank": 9.0}
    records = [sample("a.weight[0]", **high), sample("a.weight[1]")]
    assert euclidean_parameters(observe(records)) == []
    records = [sample("a.weight[0]", **high), sample("a.weight[1]", **high)]
    assert euclidean_parameters(observe(records)) == ["a.weight"]


def test_patterns_match_what_they_name_and_pass_through_the_settings():
    others = ["model.layers.1.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight"]
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 3, 12)]
    names += ["decoder.block.0.layer.1.DenseReluDense.wi-0.weight", "plain.weight"]
    patterns = patterns_of(names)
    assert patterns[0] == r"^model\.layers\.(0|3|12)\.mlp\.up_proj\.weight$"
    read = MuonConfig.from_optim_args(f"lr=1,adamw_params={'|'.join(patterns)}").adamw_params
    assert read == patterns
    for name in names:
        assert any(re.search(pattern, name) for pattern in read)
    for other in others:
        assert not any(re.search(pattern, other) for pattern in read)


def test_many_layers_make_patterns_that_are_accepted():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(1000)]
    patterns = patterns_of(names)
    assert len(patterns) == 10
    assert MuonConfig.from_optim_args(f"adamw_params={'|'.join(patterns)}").adamw_params == patterns


@pytest.mark.parametrize("records", [[], [{"step": 1, "layer": "w", "visible_rank": 1.0}]])
def test_records_without_the_numbers_say_how_to_get_them(records):
    with pytest.raises(ValueError, match=r"SpectralMonitor\(layers='\.', every=50\)"):
        observe(records)
