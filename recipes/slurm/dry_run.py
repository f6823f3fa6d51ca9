"""Check a job file without SLURM: what it would start on each machine, and whether that fits.

In: ``python recipes/slurm/dry_run.py recipes/slurm/2_nodes.sbatch [options of the recipe]``, on any
machine. Out: the command of every machine, and a last line with processes and tokens; or what is
wrong, in a sentence, with exit status 1. Stand-ins take the place of srun and scontrol.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
NEEDED = ("nodes", "gpus-per-node", "ntasks-per-node", "signal")
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "recipes/llama_pretrain")]

import settings  # noqa: E402
from shared.arguments import RecipeError  # noqa: E402


def directives(job: Path) -> dict[str, str]:
    """Return the requests of a job file to SLURM: its ``#SBATCH`` options by name."""
    text = job.read_text(encoding="utf8")
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))


def install(folder: Path) -> None:
    """Copy the stand-ins into a folder that comes first on PATH; scontrol writes there."""
    for path in STAND_INS.iterdir():
        shutil.copy(path, folder)  # with its permissions


def variables(folder: Path, nodes: int, gpus: int, **more: str) -> dict[str, str]:
    """Return the environment variables of a job on ``nodes`` machines with ``gpus`` GPUs each."""
    return os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(gpus),
        **more,
    }


def commands(job: Path, options: list[str], folder: Path) -> list[list[str]]:
    """Return the command that a job would start on each machine, as a list of words.

    Raises:
        RecipeError: the job file is incomplete, or fails.
    """
    if not job.is_file():
        raise RecipeError(f"There is no job file {str(job)!r}.")
    asked = directives(job)
    missing = [name for name in NEEDED if name not in asked]
    if missing:
        raise RecipeError(f"{job} has no line #SBATCH --{missing[0]}=….")
    install(folder)
    size = (int(asked["nodes"]), int(asked["gpus-per-node"]))
    done = subprocess.run(
        ["bash", job.resolve(), *options],
        env=variables(folder, *size, DRY_RUN="1"),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RecipeError(f"{job} ends with status {done.returncode}: {done.stderr.strip()}")
    return [line.split() for line in done.stdout.splitlines()]


def check(job: Path, started: list[list[str]]) -> str:
    """Check everything that can be checked without SLURM, and summarize what would train.

    Raises:
        RecipeError: a file does not exist; machines and processes do not match; the job leaves no
            time to save; or the recipe does not accept its options.
    """
    asked = directives(job)
    nodes, gpus = int(asked["nodes"]), int(asked["gpus-per-node"])
    if len(started) != nodes:
        raise RecipeError(f"{job} asks for {nodes} machines and starts {len(started)} launchers.")
    words = started[0]
    launch = dict(pairwise(words))
    for name in (launch.get("--config_file", ""), *(w for w in words if w.endswith(".py"))):
        if not (ROOT / name).is_file():
            raise RecipeError(f"{job} names the file {name!r}, which does not exist.")
    seconds = re.fullmatch(r"B:USR1@(\d+)", asked["signal"])
    if seconds is None or int(seconds[1]) <= 150:
        raise RecipeError(
            f"{job} has --signal={asked['signal']}: B:USR1@180 or more is expected, since "
            "processes may take 150 seconds to save (TORCH_ELASTIC_SHUTDOWN_TIMEOUT in job.sh)."
        )
    processes = nodes * gpus
    said = f"{nodes} machines with {gpus} GPUs: {processes} processes"
    at = next((n for n, word in enumerate(words) if word.endswith("llama_pretrain/run.py")), None)
    if at is None:
        return said
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        values = settings.read(words[at + 1 :], settings.SETTINGS, settings.HERE).values
        settings.set_step_counts(values)
    finally:
        os.environ.pop("WORLD_SIZE") if before is None else os.environ.update(WORLD_SIZE=before)
    if values["expected_world_size"] not in (None, processes):
        raise RecipeError(
            f"{job} asks for {processes} GPUs, and --expected_world_size is "
            f"{values['expected_world_size']}."
        )
    return (
        f"{said}, {values['max_steps']:,} steps of {values['tokens_per_step']:,} tokens, "
        f"accumulated over {values['gradient_accumulation_steps']} passes of "
        f"{values['per_device_train_batch_size']} × {values['seq_len']} tokens on each process; "
        f"into {values['output_dir']}"
    )


def main() -> None:
    """Check the job file that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    job = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        started = commands(job, sys.argv[2:], Path(folder))
    for number, words in enumerate(started):
        print(f"node{number}: {' '.join(words)}")
    print(f"ok: {check(job, started)}")


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
