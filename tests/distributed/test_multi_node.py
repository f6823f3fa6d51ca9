"""Two machines train the weights that one process trains.

The machines are network namespaces at the two ends of a virtual cable; they share nothing but the
file system. Where namespaces cannot be made, two launchers on the loopback address stand in.
"""

import os
import shutil
import subprocess
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from tests.distributed import recipe
from tests.distributed.launch import free_port
from tests.integration.tiny import largest_difference

pytestmark = pytest.mark.full
IP = shutil.which("ip", path=os.pathsep.join([os.environ["PATH"], "/sbin", "/usr/sbin"])) or "ip"
PROCESSES = 4  # of both machines together
CONFIGS = {
    "multi_node_fsdp2": (recipe.ON_FSDP, "FSDP"),
    "multi_node_zero3": (recipe.RUN, "DEEPSPEED"),
}


@dataclass(frozen=True)
class Machine:
    """An address, what a command there starts with, and the variables it needs."""

    address: str = "127.0.0.1"
    inside: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def ip(*arguments):
    subprocess.run([IP, *arguments], check=True, capture_output=True)


@contextmanager
def namespaces():
    """Two namespaces joined by a cable, removed at the end."""
    ends = {f"muon{os.getpid()}{end}": f"cable{end}" for end in "ab"}
    made = []
    try:
        for name in ends:
            ip("netns", "add", name)
            made.append(name)
        (a, cable_a), (b, cable_b) = ends.items()
        ip("link", "add", cable_a, "netns", a, "type", "veth", "peer", "name", cable_b, "netns", b)
        machines = []
        for number, (name, cable) in enumerate(ends.items(), 1):
            address = f"10.213.77.{number}"
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
            ip("netns", "exec", name, "true")
            inside = [IP, "netns", "exec", name]
            machines.append(Machine(address, inside, {"GLOO_SOCKET_IFNAME": cable}))
        yield machines
    finally:
        for name in made:
            ip("netns", "delete", name)


@pytest.fixture(scope="module")
def machines():
    with ExitStack() as stack:
        try:
            yield stack.enter_context(namespaces())
        except (OSError, subprocess.CalledProcessError) as error:
            warnings.warn(f"No namespaces ({error}): two launchers on one address", stacklevel=1)
            yield [Machine(), Machine()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return recipe.alone(tmp_path_factory.mktemp("runs") / "alone")


def train_on(machines, config, folder):
    """Start the launcher on each machine and return the run they make together."""
    script, _ = CONFIGS[config]
    meeting = ["--main_process_ip", machines[0].address, "--main_process_port", str(free_port())]
    commands = [
        machine.inside
        + recipe.accelerate(
            config, "--num_processes", str(PROCESSES), "--machine_rank", str(rank), *meeting
        )
        + script
        + recipe.settings(folder, expected_world_size=PROCESSES)
        for rank, machine in enumerate(machines)
    ]
    outcomes = recipe.run_together(commands, folder, [machine.environment for machine in machines])
    for status, output in outcomes:
        assert status == 0, output[-3000:]
    return recipe.Finished(folder)


@pytest.mark.parametrize("config", CONFIGS)
def test_two_machines_train_the_weights_of_one_process(config, machines, alone, tmp_path):
    run = train_on(machines, config, tmp_path / config)
    assert run.results["world_size"] == PROCESSES
    assert run.results["distributed_type"] == CONFIGS[config][1]
    if config == "multi_node_fsdp2":
        assert run.layout["mesh"] == [PROCESSES]
        assert run.layout["placements"] == "(Shard(dim=0),)"
    # A quarter of the state on each process; counters are not sharded, and shards are padded.
    share = run.results["optimizer_state_bytes"] / alone.results["optimizer_state_bytes"]
    assert share == pytest.approx(1 / PROCESSES, rel=5e-3)
    # As in test_accelerate_configs.py, which has the negative control.
    assert (run.losses() - alone.losses()).abs().max() < 1e-5
    assert largest_difference(run.weights, alone.weights) < 2e-6
