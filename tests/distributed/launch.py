"""Start a module of this folder on several processes, bounded in time."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Port 0: the rendezvous takes a free port itself, so that launches cannot collide.
ON_LOOPBACK = [
    "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
]  # fmt: skip

# DeepSpeed builds an extension at its first start, with the ninja of this environment, and again if
# the compiler has another name. PEFT's BOFT names gcc, and where it fails to build, the name stays.
ON_CPU = {
    "CXX": os.environ.get("CXX", "c++"),
    "ACCELERATE_USE_CPU": "true",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "TORCH_EXTENSIONS_DIR": os.environ.get(
        "TORCH_EXTENSIONS_DIR", str(ROOT / ".venv" / "torch_extensions")
    ),
}


def free_port():
    """A port for launchers that do not take a free one themselves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(module, processes, *arguments, timeout=240, check=True):
    """Run ``tests.distributed.<module>`` under torchrun on the loopback address."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run",
            "--nproc-per-node", str(processes),
            *ON_LOOPBACK,
            "-m", f"tests.distributed.{module}", *map(str, arguments),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, **ON_CPU},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
