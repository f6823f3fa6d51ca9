"""A rank that dies ends the launch, and training goes on from the last checkpoint."""

import time

import pytest
import torch

from tests.distributed.launch import launch
from tests.integration.tiny import largest_difference


@pytest.mark.full
def test_a_killed_rank_ends_the_others_and_resume_is_exact(tmp_path):
    launch("killed", 2, tmp_path, "whole")
    started = time.monotonic()
    ended = launch("killed", 2, tmp_path, "killed", check=False)
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr
    assert time.monotonic() - started < 120  # the timeout of a process group is 1800 s
    assert not (tmp_path / "killed.pt").exists()
    launch("killed", 2, tmp_path, "resumed")
    whole, resumed = (torch.load(tmp_path / f"{how}.pt") for how in ("whole", "resumed"))
    assert largest_difference(whole, resumed) == 0
