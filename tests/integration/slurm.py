"""Stand-ins for SLURM's commands: jobs run here, each node a session of processes.

In: an empty folder. Out: executables in it, to be put first on PATH, and a file ``requeued`` once a
job has gone back into the queue. Machines are called node0, node1, …, or all ``HOSTS``.
"""

import os
import sys

from tests.distributed.launch import ROOT

JOBS = ROOT / "recipes" / "slurm"
# As SLURM does it: USR1 reaches every process of a task, and SIGTERM kills them.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
from itertools import dropwhile

command = list(dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(n)}}, start_new_session=True)
    for n in nodes
]
for number, sent in ((signal.SIGUSR1, signal.SIGUSR1), (signal.SIGTERM, signal.SIGKILL)):
    signal.signal(number, lambda *_, sent=sent: [os.killpg(task.pid, sent) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do echo "${HOSTS:-node$n}"; done ;;
    requeue) echo "$2" > "$(dirname "$0")/requeued" ;;
esac
"""


def install(folder):
    """Write the commands."""
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)


def variables(folder, nodes, gpus, **more):
    """The environment of a job."""
    return os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(gpus),
        **more,
    }
