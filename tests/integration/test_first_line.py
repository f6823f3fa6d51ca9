"""One line says what trains when training begins: once, on one rank, and where a user sees it."""

import logging

import pytest
from transformers.utils import logging as of_transformers

import hf_muon.auto  # noqa: F401
from hf_muon import create_muon_optimizer
from hf_muon.integrations.callback import MuonCallback
from hf_muon.integrations.notice import first_line
from tests.integration.tiny import arguments, tiny_llama, trained, trainer_of

# The matrices of two layers of width 32; two tables of 128 tokens, and five norms.
SIZES = "Muon trains 14 matrices (15.4 k parameters), AdamW 7 tensors (8.35 k)"


@pytest.fixture(autouse=True)
def default_verbosity():
    """Of transformers, which is one for the process, and which other tests set."""
    before = of_transformers.get_verbosity()
    of_transformers.set_verbosity_warning()
    yield
    of_transformers.set_verbosity(before)


def said(text):
    return [line for line in text.splitlines() if "Muon trains" in line]


def test_it_is_seen_once_in_each_call_of_train(tmp_path, capfd):
    trainer = trained(tmp_path, max_steps=1)
    line = f"hf_muon: {SIZES}; details in {tmp_path / 'muon_report.json'}"
    printed = capfd.readouterr()
    assert said(printed.err) == [line]
    assert said(printed.out) == []
    trainer.train()
    assert said(capfd.readouterr().err) == [line]


def test_it_is_no_warning(tmp_path, caplog):
    trained(tmp_path, max_steps=1)
    assert said(caplog.text) == []


def test_who_logs_info_has_it_there_alone(tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO, logger="hf_muon"):
        trained(tmp_path, max_steps=1)
    (record,) = [one for one in caplog.records if said(one.getMessage())]
    assert record.levelname == "INFO"
    assert said(capfd.readouterr().err) == []


def test_who_wants_errors_alone_does_not_see_it(tmp_path, capfd):
    trained(tmp_path, max_steps=1, log_level="error")
    assert said(capfd.readouterr().err) == []


def test_other_ranks_and_other_optimizers_are_silent(tmp_path, capfd):
    trainer = trainer_of(tmp_path)
    optimizer = create_muon_optimizer(tiny_llama(), lr=0.1)
    trainer.state.is_world_process_zero = False
    MuonCallback().on_train_begin(trainer.args, trainer.state, None, optimizer=optimizer)
    trained(tmp_path, max_steps=1, optim="adamw_torch")
    assert said(capfd.readouterr().err) == []
    assert not (tmp_path / "muon_report.json").exists()


def test_a_report_that_was_not_written_is_not_named(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    callback, args = MuonCallback(), arguments(tmp_path)
    args.output_dir = str(tmp_path / "file" / "below")
    optimizer = create_muon_optimizer(tiny_llama(), lr=0.1)
    callback.on_train_begin(args, trainer_of(tmp_path).state, None, optimizer=optimizer)
    assert said(capfd.readouterr().err) == [f"hf_muon: {SIZES}"]


@pytest.mark.parametrize("routes", [True, False])
def test_groups_made_by_hand_are_counted_without_their_sizes(routes):
    optimizer = create_muon_optimizer(tiny_llama(), lr=0.1)
    if not routes:
        optimizer.routes = None
    expected = SIZES if routes else "Muon trains 14 matrices, AdamW 7 tensors"
    assert first_line(optimizer, None) == expected
