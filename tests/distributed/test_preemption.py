"""Ranks that a signal reaches at different moments stop after the same step, and go on exactly."""

import json
import os
import re
import shlex

import pytest

from tests.distributed import recipe
from tests.integration import slurm
from tests.integration.preempted import write_stream
from tests.integration.tiny import largest_difference

MODULE = "tests.distributed.preempted"
FULL = pytest.mark.full
# The configuration, how the module is told of it, and where the signal goes: to one rank alone, or
# to the launcher, which hands it on to its ranks.
CASES = {
    "ddp": ("ddp", [], "self:SIGUSR1"),
    "launcher": ("ddp", [], "launcher:SIGTERM"),
    "fsdp2": ("fsdp2", ["fsdp2"], "self:SIGTERM"),
    "zero2": ("zero2", [], "self:SIGTERM"),
}
STEPS = 4
SEQUENCES = recipe.SMALL["tokens_per_step"] // recipe.SMALL["seq_len"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("stream"))


def command(config, shard, folder, stream, *options):
    launcher = recipe.accelerate(config, "--num_processes", "2", "--main_process_port", "0")
    own = recipe.settings(folder, expected_world_size=2, max_steps=STEPS, save_steps=100)
    return [*launcher, "-m", MODULE, *shard, *own, *stream, *options]


def run(folder, words, preempt=None):
    variables = {} if preempt is None else {"PREEMPT": preempt}
    ((status, output),) = recipe.run_together([words], folder, [variables])
    return status, output


@FULL
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_stop_together_and_go_on_exactly(case, stream, tmp_path):
    config, shard, how = CASES[case]
    whom, number = how.split(":")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, output = run(whole, command(config, shard, whole, stream))
    assert status == 0, output[-3000:]

    words = command(config, shard, parts, stream, "--resume_from_checkpoint", "auto")
    # The ranks do not get the signal together: only the second does, or the launcher does.
    status, output = run(parts, words, f"1:2:{number}:{whom}")
    step = 2 if whom == "self" else int(output.split("after step ")[1].split()[0])
    assert f"stopped by {number} after step {step} of {STEPS}" in output, output[-3000:]
    checkpoint = parts / f"checkpoint-{step}"
    assert (checkpoint / "trainer_state.json").is_file()
    place = json.loads((checkpoint / "stream.json").read_text())
    assert 0 < place["blocks"] <= place["trained"] == step * SEQUENCES
    assert not (parts / "results.json").exists()
    assert status == 0 or whom == "launcher"  # which ends with the signal's own status

    status, output = run(parts, words)
    assert status == 0, output[-3000:]
    resumed, expected = recipe.Finished(parts), recipe.Finished(whole)
    assert resumed.results["world_size"] == 2
    assert resumed.results["distributed_type"] == expected.results["distributed_type"]
    assert largest_difference(resumed.weights, expected.weights) == 0


@FULL
def test_a_slurm_job_goes_back_into_the_queue_and_ends(stream, tmp_path):
    out, commands = tmp_path / "out", tmp_path / "bin"
    commands.mkdir()
    slurm.install(commands)
    job = tmp_path / "job.sbatch"
    steps = 40  # more than can pass until the signal has gone through shell, srun and launcher
    options = recipe.settings(out, expected_world_size=2, max_steps=steps, save_steps=100)
    words = shlex.join([*options, *stream, "--resume_from_checkpoint", "auto"])
    job.write_text(
        "cd $SLURM_SUBMIT_DIR; source recipes/slurm/job.sh; export BATCH_SHELL=$$\n"
        f"train ddp -- -m {MODULE} {words}\n"
    )
    # Two machines with a process each, both here; the job's number makes the port.
    job_id = str(os.getpid())
    own = {"SLURM_JOB_ID": job_id, "HOSTS": "127.0.0.1", "PREEMPT": "1:2:SIGUSR1:batch"}
    variables = slurm.variables(commands, 2, 1, **own)
    status, output = run_job(job, out, variables)
    assert status == 0, output[-3000:]
    assert re.search(rf"stopped by SIG\w+ after step \d+ of {steps}", output)
    assert (commands / "requeued").read_text() == f"{job_id}\n"
    assert not (out / "results.json").exists()

    del variables["PREEMPT"]
    (commands / "requeued").unlink()
    status, output = run_job(job, out, variables)
    assert status == 0, output[-3000:]
    assert recipe.Finished(out).results["steps"] == steps
    assert not (commands / "requeued").exists()


def run_job(job, folder, variables):
    # launch.py's environment leaves accelerate the choice of the backend; see there.
    own = recipe.environment(folder) | variables
    own.pop("ACCELERATE_USE_CPU", None)
    ((status, output),) = recipe.run_together([["bash", str(job)]], folder, [own])
    return status, output
