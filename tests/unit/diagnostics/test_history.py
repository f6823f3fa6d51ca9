"""The file of samples: append-only, and readable after crashes and resumes."""

import pytest

from hf_muon.diagnostics.history import append_records, read_spectra


def sample(step, value=0.0):
    return {"step": step, "layer": "w", "gap": value}


def write(path, *records):
    append_records(path / "spectra.jsonl", records)


def test_what_was_trained_again_is_passed_over(tmp_path):
    write(tmp_path, {"begin": 0}, sample(2), sample(4), sample(6))
    write(tmp_path, {"begin": 4}, sample(6, 1.0), sample(8))
    read = read_spectra(tmp_path)
    assert [s["step"] for s in read] == [2, 4, 6, 8]
    assert read[2]["gap"] == 1.0
    assert len((tmp_path / "spectra.jsonl").read_text().splitlines()) == 7


def test_a_line_that_a_crash_cut_is_ended_and_passed_over(tmp_path):
    write(tmp_path, {"begin": 0}, sample(2), sample(4))
    path = tmp_path / "spectra.jsonl"
    path.write_text(path.read_text()[:-10])
    assert [s["step"] for s in read_spectra(path)] == [2]
    write(tmp_path, {"begin": 2}, sample(4))
    assert [s["step"] for s in read_spectra(path)] == [2, 4]


def test_other_lines_that_are_no_json_are_an_error(tmp_path):
    write(tmp_path, {"begin": 0}, sample(2))
    path = tmp_path / "spectra.jsonl"
    path.write_text(path.read_text().replace('{"step"', 'what\n{"step"'))
    with pytest.raises(ValueError, match="Line 2 of"):
        read_spectra(path)


def test_warnings_are_no_samples(tmp_path):
    write(tmp_path, {"begin": 0}, {"step": 2, "layer": "w", "warning": "text"}, sample(2))
    assert read_spectra(tmp_path) == [sample(2)]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"spectra\.jsonl"):
        read_spectra(tmp_path)
