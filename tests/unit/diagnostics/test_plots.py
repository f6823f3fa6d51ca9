"""The figure of a run's samples."""

import sys

import pytest

from hf_muon.diagnostics.history import append_records
from hf_muon.diagnostics.plots import plot_spectra, spectra_figure

NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]


def sample(step, layer, **values):
    quantities = {
        "average_sigma_1": 2.0 * step,
        "noise_edge": 1.0,
        "visible_rank": 1.0,
        "update_rms": 0.1,
    }
    return {"step": step, "layer": layer, **quantities, **values}


def test_every_quantity_is_drawn_over_the_steps(tmp_path):
    samples = [sample(step, name) for step in (5, 10) for name in NAMES]
    figure = spectra_figure(samples)
    sigma, rank, size, quality = figure.axes
    assert [list(line.get_xdata()) for line in sigma.lines] == [[5, 10]] * 4
    assert list(sigma.lines[0].get_ydata()) == [10.0, 20.0]
    assert [list(line.get_ydata()) for line in rank.lines] == [[1.0, 1.0]] * 2
    assert len(size.lines) == 2
    assert all(len(line.get_xdata()) == 0 for line in quality.lines)  # lora_update="product"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1"]


def test_a_layer_keeps_its_name_where_there_is_no_other():
    (text,) = spectra_figure([sample(5, NAMES[0])]).legends[0].get_texts()
    assert text.get_text() == NAMES[0]


def test_the_image_lies_beside_the_file(tmp_path):
    append_records(tmp_path / "spectra.jsonl", [{"begin": 0}, sample(5, NAMES[0])])
    assert plot_spectra(tmp_path) == tmp_path / "spectra.png"
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_no_samples_are_an_error_that_says_so(tmp_path):
    append_records(tmp_path / "spectra.jsonl", [{"begin": 0}])
    with pytest.raises(ValueError, match="no samples"):
        plot_spectra(tmp_path)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        spectra_figure([sample(5, NAMES[0])])
