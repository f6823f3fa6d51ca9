"""Launch the LLaMA recipe with the configurations of recipes/accelerate, on CPUs, bounded in time.

In: a configuration, the number of processes, an output folder. Out: what the run wrote there.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed.launch import ON_CPU, ROOT

RUN = ["recipes/llama_pretrain/run.py"]
ON_FSDP = ["-m", "tests.distributed.recipe_on_fsdp"]
SMALL = {
    "corpus": "stdlib",
    "max_documents": 30,
    "vocab_size": 400,
    "seq_len": 32,
    "tokens_per_step": 1024,  # 8 passes of one process, 2 of each of four
    "per_device_train_batch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eval_blocks": 8,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "disable_tqdm": True,
    # Some CPUs compute the polar factor in bfloat16, whose roundings flip with those of a gradient.
    "optim_args": "order=pre_polar,polar_dtype=float32",
}


@dataclass(frozen=True)
class Finished:
    """A finished run: ``results.json``, the saved weights, and how the parameters were placed."""

    folder: Path

    @property
    def results(self):
        return json.loads((self.folder / "results.json").read_text())

    @property
    def weights(self):
        return load_file(self.folder / "model.safetensors")

    @property
    def layout(self):
        """What ``recipe_on_fsdp`` wrote."""
        return json.loads((self.folder / "layout.json").read_text())

    def losses(self):
        results = self.results
        curves = [point["loss"] for key in ("train_curve", "eval_curve") for point in results[key]]
        return torch.tensor([*curves, results["final_validation_loss"]])


def accelerate(config, *options):
    """The start of a command: accelerate's launcher with a configuration of the repository."""
    file = f"recipes/accelerate/{config}.yaml"
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, *options]


def settings(folder, **overrides):
    """The recipe's arguments for a small model."""
    options = {**SMALL, "output_dir": folder, **overrides}
    return ["configs/tiny.yaml", *chain(*((f"--{key}", str(options[key])) for key in options))]


def train(folder, command, **overrides):
    """Train in one launch and return the finished run."""
    ((status, output),) = run_together([command + settings(folder, **overrides)], folder)
    assert status == 0, output[-3000:]
    return Finished(folder)


def alone(folder, **overrides):
    """Train in one process, without a launcher."""
    return train(folder, [sys.executable, *RUN], **overrides)


def environment(folder):
    """The environment of a launch; the runs of a test share one cache of tokenizers."""
    variables = {**os.environ, **ON_CPU, "HF_HUB_OFFLINE": "1"}
    variables["HF_MUON_CACHE"] = str(folder.parent / "cache")
    # accelerate ignores DeepSpeed where this is set; use_cpu of configs/tiny.yaml is enough.
    variables.pop("ACCELERATE_USE_CPU")
    return variables


def run_together(commands, folder, environments=(), seconds=200):
    """Run commands side by side; when one fails or time is up, end the others.

    Returns the exit status and the output of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"output{index}.txt" for index in range(len(commands))]
    running = []
    try:
        for index, (command, path) in enumerate(zip(commands, paths, strict=True)):
            own = environments[index] if environments else {}
            with path.open("w") as file:
                started = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment(folder) | own,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            running.append(started)
        wait_for_all(running, time.monotonic() + seconds)
    finally:
        for started in running:
            started.terminate()  # a launcher that is killed instead leaves its processes behind
            started.wait(60)
    return [
        (started.returncode, path.read_text()) for started, path in zip(running, paths, strict=True)
    ]


def wait_for_all(running, deadline):
    """Return when all have ended well, one has failed, or the time is up."""
    while time.monotonic() < deadline:
        statuses = [started.poll() for started in running]
        if all(status == 0 for status in statuses) or any(statuses):
            return
        time.sleep(0.2)
