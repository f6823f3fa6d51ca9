"""Two processes under DDP train the weights that one process trains on the same batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.tiny import largest_difference, tiny_llama

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(processes, folder, batch):
    """Run train_ddp.py under torchrun; returns what each rank saved."""
    folder.mkdir()
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run",
            "--nproc-per-node", str(processes),
            "--master-addr", "127.0.0.1", "--master-port", str(free_port()),
            "-m", "tests.distributed.train_ddp", str(folder), str(batch),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return launch(2, tmp_path_factory.mktemp("ddp") / "two", batch=2)


def test_the_ranks_hold_the_same_weights(two_ranks):
    assert [rank["world_size"] for rank in two_ranks] == [2, 2]
    assert largest_difference(two_ranks[0]["weights"], two_ranks[1]["weights"]) == 0


def test_two_processes_equal_one(two_ranks, tmp_path):
    (alone,) = launch(1, tmp_path / "one", batch=4)
    assert alone["world_size"] == 1
    # DDP averages two gradients where one process sums one batch: float32 rounding, which the
    # polar factor magnifies in directions of small singular values.
    assert largest_difference(two_ranks[0]["weights"], alone["weights"]) < 1e-4
    start = {name: p.detach() for name, p in tiny_llama().named_parameters()}
    assert largest_difference(start, alone["weights"]) > 1e-2


def test_state_is_whole_in_the_checkpoint(two_ranks, tmp_path_factory):
    folder = next(tmp_path_factory.getbasetemp().glob("ddp*")) / "two" / "out" / "checkpoint-2"
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    assert len(state["state"]) == len(names) == len(dict(tiny_llama().named_parameters()))
