"""Save a checkpoint under one sharding and go on from it under another.

reshard.py save KIND FOLDER trains two steps and saves; reshard.py load KIND FOLDER OUT loads,
trains two more and writes the whole weights; reshard.py full KIND OUT does both by whole tensors.
"""

import copy
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from tests.distributed import layouts

CASES = {
    "pre_polar": {},
    "post_polar": {"order": "post_polar"},
    "kernel": {"momentum": (0.5, 0.9, 0.98)},
    "rows": {"rescale": "rows"},
    "int8": {"momentum_dtype": "int8", "rescale": "entries"},
    "auto, hyperball": {
        "momentum": "auto", "prefilter": "clip", "step_rule": "hyperball", "weight_decay": 0.0,
    },
}  # fmt: skip


def build(kind, case):
    model, told = layouts.build(kind)
    return model, layouts.build_optimizer(model, **CASES[case], **told)


def train(model, optimizer, steps):
    for step in steps:
        layouts.set_gradients(model, step)
        optimizer.step()


def state_of(model, optimizer):
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def save(kind, folder):
    for case in CASES:
        model, optimizer = build(kind, case)
        train(model, optimizer, range(2))
        dcp.save(state_of(model, optimizer), checkpoint_id=f"{folder}/{case}")


def full(kind, out):
    """Through whole tensors on every rank, as launchers do that save one file."""
    results = {}
    options = StateDictOptions(full_state_dict=True)
    for case in CASES:
        model, optimizer = build(kind, case)
        train(model, optimizer, range(2))
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        again = layouts.build_optimizer(model, **CASES[case])
        model.zero_grad()  # with gradients around, no state is made to load into
        set_optimizer_state_dict(model, again, state, options=options)
        train(model, again, range(2, 4))
        results[case] = layouts.full_weights(model)
    if dist.get_rank() == 0:
        torch.save(results, out)


def load(kind, folder, out):
    results = {}
    for case in CASES:
        model, optimizer = build(kind, case)
        with torch.no_grad():
            for p in model.parameters():
                p.neg_()
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=f"{folder}/{case}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        train(model, optimizer, range(2, 4))
        results[case] = layouts.full_weights(model)
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    with layouts.process_group():
        {"save": save, "load": load, "full": full}[sys.argv[1]](*sys.argv[2:])
