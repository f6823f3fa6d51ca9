"""``muon_report.json``: it holds what trained, and never stops a run."""

import json
import os
import pathlib

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import hf_muon.auto  # noqa: F401
from hf_muon import MuonConfig, create_muon_optimizer
from hf_muon.integrations.report import build_report, write_report
from tests.integration.tiny import (
    tiny_llama,
    trained,
)


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    write = pathlib.Path.write_text

    def full(self, *args, **kwargs):
        if "muon_report" in self.name:
            write(self, "half", encoding="utf-8")
            raise OSError(28, "No space left on device")
        return write(self, *args, **kwargs)

    optimizer = create_muon_optimizer(tiny_llama(), lr=0.1)
    write_report(optimizer, tmp_path)
    before = (tmp_path / "muon_report.json").read_text()
    monkeypatch.setattr(pathlib.Path, "write_text", full)
    trained(tmp_path, save_strategy="steps", save_steps=2)
    assert caplog.text.count("No space left on device. Training goes on without it.") == 3
    assert (tmp_path / "muon_report.json").read_text() == before
    assert [name for name in os.listdir(tmp_path) if "muon_report" in name] == ["muon_report.json"]


@pytest.mark.parametrize("factor", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)])
def test_schedules_of_other_numbers_leave_a_report_that_can_be_read(tmp_path, factor):
    optimizer = create_muon_optimizer(tiny_llama(), lr=0.1, weight_decay=0.1)
    LambdaLR(optimizer, lambda step: factor)
    write_report(optimizer, tmp_path)
    group = json.loads((tmp_path / "muon_report.json").read_text())["groups"][0]
    assert (group["lr"], group["initial_lr"]) == (0.1, 0.1)
    assert group["scheduled_lr"] == pytest.approx(0.05)


def test_the_report_has_every_setting_and_the_rate_before_the_warmup(tmp_path):
    trained(tmp_path, warmup_steps=2, optim_args="adamw_params=q_proj,adamw_lr=1e-3")
    report = json.loads((tmp_path / "muon_report.json").read_text())
    assert report["groups"][0]["lr"] == 1e-2
    assert report["groups"][0]["scheduled_lr"] == 0.0
    assert report["config"]["adamw_params"] == ["q_proj"]
    assert MuonConfig(**report["config"]).adamw_lr == 1e-3


def test_values_of_others_in_the_groups_do_not_stop_the_report():
    optimizer = create_muon_optimizer(tiny_llama(), lr=0.1)
    optimizer.param_groups[0].update(of_others=[torch.zeros(2), object()], max_lr=np.int64(3))
    group = json.loads(json.dumps(build_report(optimizer)))["groups"][0]
    assert group["max_lr"] == 3
