"""Checks that the processes of a launch train together as requested.

In: training arguments, or a Trainer. Out: nothing, or an error that says how to launch. Several
launchers silently start something else than requested.
"""

from __future__ import annotations

import os
import time

from accelerate.utils import get_cpu_distributed_information, parse_flag_from_env
from transformers import Trainer, TrainingArguments

from shared.arguments import RecipeError


def launched_processes() -> int:
    """Return the number of processes that torchrun, accelerate, DeepSpeed or MPI announced."""
    return get_cpu_distributed_information().world_size


def check_world_size(training: TrainingArguments, asked: int | None = None) -> None:
    """Stop unless the processes train together as requested.

    Some ways to launch silently start a single process, or several that do not communicate; on a
    CPU most of them do.

    Args:
        training: training arguments; their world size is the number of processes that connected.
        asked: the required number of processes. Default: as many as were launched.
    """
    expected = asked or launched_processes()
    if training.world_size != expected:
        raise RecipeError(
            f"{expected} processes were asked for, but {training.world_size} train together. "
            f"Launch with `torchrun --nproc_per_node {expected} run.py ...`, or with `accelerate "
            f"launch --num_processes {expected}` and a configuration of recipes/accelerate; on a "
            "CPU the processes find each other with --use_cpu true only."
        )
    if asked is None and was_left_alone():
        raise RecipeError(
            "`accelerate launch` was asked for several processes and has started one: under --cpu, "
            "MULTI_CPU and 'NO' it starts no others. Launch with `accelerate launch --config_file "
            "recipes/accelerate/ddp.yaml --num_processes N`, on a CPU too; or train in one process "
            "with --expected_world_size 1."
        )
    if training.n_gpu > 1:
        raise RecipeError(
            f"One process sees {training.n_gpu} GPUs, and the Trainer would give each of them a "
            "batch: a step would be larger than asked for. Launch with `torchrun "
            f"--nproc_per_node {training.n_gpu} run.py ...`, or set CUDA_VISIBLE_DEVICES=0."
        )


def was_left_alone() -> bool:
    """Return whether accelerate's launcher prepared several processes but started only this one.

    The launcher then sets the port of a rendezvous that no process joins (seen in accelerate 1.15).
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ
    return launched and "MASTER_PORT" in os.environ and launched_processes() == 1


def check_sharding(trainer: Trainer) -> None:
    """Stop if accelerate trains with plain DDP where FSDP or DeepSpeed was launched."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not trainer.is_fsdp_enabled:
        raise RecipeError(
            "FSDP was launched, but accelerate has it on accelerators only and would train with "
            f"DDP on this device, {trainer.args.device.type}. Set --use_cpu false where there is "
            "a GPU; on a CPU use recipes/accelerate/ddp.yaml, or zero1 to zero3, which shard."
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not trainer.is_deepspeed_enabled:
        raise RecipeError(
            "DeepSpeed was launched, but accelerate ignores it under ACCELERATE_USE_CPU=true and "
            "would train with DDP. Unset the variable; --use_cpu true is enough on a CPU."
        )


def forget_evaluation(trainer: Trainer) -> None:
    """Make the Trainer wrap a model in DDP although it has evaluated it.

    After an evaluation, accelerate considers the model prepared, so ``train()`` would not wrap it:
    each process would silently train on its own (transformers 5.23, accelerate 1.15). FSDP's shards
    and DeepSpeed's engine are made for training from the start, and are kept.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    accelerator, model = trainer.accelerator, trainer.model
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("_is_accelerate_prepared", None)
    accelerator._models[:] = [one for one in accelerator._models if one is not model]
    trainer.model_wrapped = model


def leave_together(trainer: Trainer) -> None:
    """Wait until the first process has written its results, and close the process group.

    A process that exits early may abort, and then the launcher kills the others while they write: a
    gloo thread releases the last tensors after the collective has returned, and aborts if Python is
    shutting down by then. Seen with torch 2.13 in 8 of 100 exits on a busy CPU, in 2 of 100 with
    the group closed, and in none with the pause as well.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if trainer.args.world_size > 1:
        time.sleep(0.2)
