"""The largest amount of memory that a step takes beyond what it is given: memory.py KIND OUT.

KIND is ddp or fsdp. Rank 0 writes the peak in bytes for each size of buckets.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from hf_muon import Muon
from tests.distributed import layouts

SIDE, COUNT = 128, 48
MATRIX_BYTES = 4 * SIDE * SIDE
MATRICES_PER_BUCKET = (2, 8)


class Matrices(nn.Module):
    def __init__(self):
        super().__init__()
        self.all = nn.ParameterList(torch.randn(SIDE, SIDE) for _ in range(COUNT))


def peak_bytes(run):
    """The highest sum of allocations minus releases while a function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main(kind, out):
    peaks = {}
    for matrices in MATRICES_PER_BUCKET:
        model = Matrices()
        if kind == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = Muon(
            model.named_parameters(),
            lr=0.01,
            polar_dtype="float32",
            bucket_mb=matrices * MATRIX_BYTES / 2**20,
            distribute="owner",
            replicate_group="world" if kind == "ddp" else None,
        )
        measured = []
        for step in range(6):
            layouts.set_gradients(model, step)
            measured.append(peak_bytes(optimizer.step))
        # The first step makes the state. The profiler does not see what a thread of gloo's
        # releases, so that some steps seem to take more than they do, and none less.
        peaks[matrices] = min(measured[1:])
    if dist.get_rank() == 0:
        torch.save(peaks, out)


if __name__ == "__main__":
    with layouts.process_group():
        main(*sys.argv[1:])
