"""A training loop in plain PyTorch: FSDP2, ``create_muon_optimizer``, resumable checkpoints.

In: ``torchrun --nproc_per_node N fsdp2_loop.py [--steps 60] [--folder …] [--resume]``, on CPUs or
GPUs. Out: a loss per step on the screen, and a checkpoint (``torch.distributed.checkpoint``) in
``--folder`` every ``--save_every`` steps. A step's batch is the same on any number of processes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bytes_llama import build_model, rows
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from hf_muon import Muon, create_muon_optimizer


def main() -> None:
    """Build, shard, train, save."""
    args = parse()
    dist.init_process_group()
    mesh = device_mesh()
    torch.manual_seed(0)  # all processes build the same weights, and keep their part
    model = build_model().to(mesh.device_type)
    shard(model, mesh)
    # After sharding: the optimizer reads from the DTensors where their parts are.
    optimizer = create_muon_optimizer(
        model, lr=args.lr, weight_decay=0.1, order=args.order, polar_dtype=args.polar_dtype
    )
    start = load(model, optimizer, newest(args.folder)) if args.resume else 0
    announce(model, optimizer)

    for step in range(start, args.steps):
        batch = rows(step, mesh.get_local_rank(), mesh.size())  # (rows of this process, length)
        batch = batch.to(mesh.device_type)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(f"step {step + 1}: loss {mean(loss):.6f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(model, optimizer, args.folder / f"step-{step + 1:06d}", step + 1)
    leave()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--order", default="pre_polar")
    parser.add_argument("--polar_dtype", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/ecosystem/fsdp2"))
    parser.add_argument("--save_every", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    return parser.parse_args()


def device_mesh() -> DeviceMesh:
    """Return a mesh of all processes, one device each, or all on the CPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        torch.accelerator.set_device_index(dist.get_node_local_rank())
    return init_device_mesh(device.type if device else "cpu", (dist.get_world_size(),))


def shard(model: LlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Shard each layer, and then the rest, across the processes."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def save(model: LlamaForCausalLM, optimizer: Muon, folder: Path, step: int) -> None:
    """Write a checkpoint; each process writes its parts."""
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state, "step": torch.tensor(step)}
    dcp.save(content, checkpoint_id=folder)


def load(model: LlamaForCausalLM, optimizer: Muon, folder: Path) -> int:
    """Read a checkpoint, written by any number of processes, and return its step."""
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state, "step": torch.tensor(0)}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
    )
    return int(content["step"])


def newest(folder: Path) -> Path:
    """Return the newest complete checkpoint; torch writes ``.metadata`` after all the parts."""
    found = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    if not found:
        raise SystemExit(f"There is no checkpoint in {folder} to go on from; leave --resume out.")
    return found[-1]


def announce(model: LlamaForCausalLM, optimizer: Muon) -> None:
    """Print how many processes share how many parameters, and what trains them."""
    parameters = list(model.parameters())
    sharded = sum(isinstance(parameter, DTensor) for parameter in parameters)
    by_muon = sum(
        len(group["params"]) for group in optimizer.param_groups if group["algorithm"] == "muon"
    )
    say(
        f"processes: {dist.get_world_size()}; DTensors: {sharded} of {len(parameters)} parameters; "
        f"trained by Muon: {by_muon}"
    )


def mean(loss: torch.Tensor) -> float:
    """Return the mean over the processes."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def say(line: str) -> None:
    """Print on the first process."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def leave() -> None:
    """Wait for the others and close the group; gloo's threads need a moment (torch 2.13)."""
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)


if __name__ == "__main__":
    main()
