"""The SLURM jobs: what they would start on each machine, and that the launches fit the recipe.

A whole job, with signal and requeue, runs in ``tests/distributed/test_preemption.py``.
"""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.integration import slurm
from tests.integration.recipes import import_recipe

settings = import_recipe("llama_pretrain")["settings"]
NODES = {"1_node": 1, "2_nodes": 2, "8_nodes": 8}
GPUS = 8
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = sorted(
    path.relative_to(slurm.ROOT).as_posix()
    for pattern in (
        "recipes/slurm/*.s*[!s]",
        "recipes/slurm/stand_ins/scontrol",
        "scripts/*.sh",
        ".ci/run",
    )
    for path in slurm.ROOT.glob(pattern)
)


@pytest.fixture(params=NODES)
def job(request):
    return request.param


def dry_run(job, folder, *options):
    """Return the command on each machine, as words."""
    return slurm.dry_run.commands(slurm.JOBS / f"{job}.sbatch", list(options), folder)


def test_every_job_is_tested():
    assert {path.stem for path in slurm.JOBS.glob("*.sbatch")} == set(NODES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_sound(script):
    for checker in (["bash", "-n"], [SHELLCHECK, "--external-sources"]):
        done = subprocess.run([*checker, script], cwd=slurm.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_checker_finds_what_is_wrong(tmp_path):
    wrong = tmp_path / "wrong.sh"
    wrong.write_text("#!/usr/bin/env bash\nrm -r $1/*\n")
    assert subprocess.run([SHELLCHECK, wrong], capture_output=True).returncode == 1


def test_a_job_is_told_in_time_and_comes_back(job):
    asked = slurm.directives(slurm.JOBS / f"{job}.sbatch")
    assert asked["nodes"] == str(NODES[job])
    assert asked["gpus-per-node"] == str(GPUS)
    assert asked["ntasks-per-node"] == "1"
    assert "requeue" in asked
    # Processes may take 150 seconds to save, which have to fit between the signal and the end.
    told, number, seconds = re.fullmatch(r"(B):(USR1)@(\d+)", asked["signal"]).groups()
    assert (told, number) == ("B", "USR1")
    assert int(seconds) > 150
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=150" in (slurm.JOBS / "job.sh").read_text()


def test_machines_meet_and_have_ranks_of_their_own(job, tmp_path):
    commands = dry_run(job, tmp_path)
    assert len(commands) == NODES[job]
    found = [dict(pairwise(words)) for words in commands]
    assert sorted(int(words["--machine_rank"]) for words in found) == list(range(NODES[job]))
    for words in found:
        assert words["--main_process_ip"] == "node0"
        assert words["--main_process_port"] == "21234"
        assert words["--num_machines"] == str(NODES[job])
        assert words["--num_processes"] == str(NODES[job] * GPUS)
        assert (slurm.ROOT / words["--config_file"]).is_file()


def test_the_recipe_takes_the_launch(job, tmp_path, monkeypatch):
    words = dry_run(job, tmp_path, "--seed", "3")[0]
    (script,) = (index for index, word in enumerate(words) if word.endswith("run.py"))
    assert (slurm.ROOT / words[script]).is_file()
    processes = NODES[job] * GPUS
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    values = settings.read(words[script + 1 :], settings.SETTINGS, settings.HERE).values
    settings.set_step_counts(values)  # raises when a step does not divide
    per_pass = values["per_device_train_batch_size"] * values["seq_len"] * processes
    assert values["gradient_accumulation_steps"] * per_pass == values["tokens_per_step"]
    assert values["expected_world_size"] == processes
    assert values["resume_from_checkpoint"] == "auto"
    assert values["seed"] == 3  # options after the job's name reach the recipe


def test_a_copy_for_every_group_of_shards(tmp_path):
    words = dry_run("8_nodes", tmp_path)[0]
    found = dict(pairwise(words))
    copies = int(found["--parallelism_config_dp_replicate_size"])
    assert copies * int(found["--parallelism_config_dp_shard_size"]) == int(
        found["--num_processes"]
    )


def test_a_job_that_was_not_submitted_says_so(tmp_path):
    done = subprocess.run(
        ["bash", slurm.JOBS / "1_node.sbatch"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Submit with sbatch" in done.stderr


@pytest.mark.full
def test_the_dry_run_says_what_would_train():
    done = subprocess.run(
        [sys.executable, "recipes/slurm/dry_run.py", "recipes/slurm/2_nodes.sbatch"],
        cwd=slurm.ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *started, last = done.stdout.splitlines()
    assert [line.split(":")[0] for line in started] == ["node0", "node1"]
    assert last.startswith("ok: 2 machines with 8 GPUs: 16 processes, ")
    assert "steps of 131,072 tokens" in last


WRONG = {
    "#SBATCH --signal=B:USR1@180\n": ("", "has no line #SBATCH --signal=…."),
    "B:USR1@180": ("B:USR1@90", "may take 150 seconds to save"),
    "configs/130m.yaml": ("configs/130.yaml", "Did you mean 'configs/130m.yaml'?"),
    "train ddp": ("train dpd", "'recipes/accelerate/dpd.yaml', which does not exist"),
    "--gpus-per-node=8": ("--gpus-per-node=4", "--expected_world_size is 8"),
    "--expected_world_size": ("--tokens_per_step 999 --expected_world_size", "not a multiple"),
}


@pytest.mark.parametrize("line", WRONG)
def test_the_dry_run_finds_what_is_wrong(line, tmp_path):
    other, message = WRONG[line]
    right = (slurm.JOBS / "1_node.sbatch").read_text()
    job = tmp_path / "job.sbatch"
    job.write_text(right.replace(line, other))
    assert job.read_text() != right
    with pytest.raises(slurm.dry_run.RecipeError, match=re.escape(message)):
        slurm.dry_run.check(job, slurm.dry_run.commands(job, [], tmp_path))
