"""Gradients that are missing or bad on some ranks only: gradients.py OUT, on two ranks, FSDP2."""

import sys

import torch
import torch.distributed as dist

from tests.distributed import layouts


def main():
    rank = dist.get_rank()
    results = {}

    model, _ = layouts.build("fsdp")
    optimizer = layouts.build_optimizer(model)
    layouts.set_gradients(model, 0, skip=("up", "embedding") if rank else ())
    for name, p in model.named_parameters():
        if name == "down":
            p.grad = None
    optimizer.step()
    results["missing"] = layouts.full_weights(model)
    results["steps"] = {
        name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()
    }

    layouts.set_gradients(model, 1)
    if rank:
        dict(model.named_parameters())["q"].grad.to_local()[0, 0] = float("nan")
    try:
        optimizer.step()
        results["message"] = None
    except FloatingPointError as error:
        results["message"] = str(error)
    results["after"] = layouts.full_weights(model)

    layouts.set_gradients(model, 1)
    if rank:  # each entry may be used, and the norm overflows
        model.q.grad.to_local().fill_(5e37)
    optimizer.step()
    results["large"] = layouts.full_weights(model)

    for p in model.parameters():
        p.grad = None
    model.q.grad = torch.zeros_like(model.q)
    optimizer.state[model.q]["exp_avg"] = torch.zeros(layouts.SHAPES["q"])
    try:
        optimizer.step()
    except ValueError as error:
        results["state"] = str(error)
    messages = [None, None]
    dist.all_gather_object(messages, results["message"])
    results["messages"] = messages
    if rank == 0:
        torch.save(results, sys.argv[1])


if __name__ == "__main__":
    with layouts.process_group():
        main()
