"""Start a module of this folder on several processes, bounded in time."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(module, processes, *arguments, timeout=240, check=True):
    """Run ``tests.distributed.<module>`` under torchrun on the loopback address."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run",
            "--nproc-per-node", str(processes),
            "--master-addr", "127.0.0.1", "--master-port", str(free_port()),
            "-m", f"tests.distributed.{module}", *map(str, arguments),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
