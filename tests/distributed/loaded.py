"""Train a model that was sharded while it was loaded: loaded.py FOLDER OUT.

FOLDER holds a saved model; transformers cuts it for tensor parallelism over all ranks.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_muon import create_muon_optimizer
from tests.distributed import layouts

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "polar_dtype": "float32", "replicate_group": "world"}
ORDERS = ("pre_polar", "post_polar")


def train(model, order):
    optimizer = create_muon_optimizer(model, order=order, **SETTINGS)
    for step in range(3):
        layouts.set_gradients(model, step)
        optimizer.step()
    return layouts.full_weights(model)


def main(folder, out):
    results = {}
    for order in ORDERS:
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
        sharded = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
        results[order] = {"weights": train(model, order), "sharded": sharded}
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    with layouts.process_group():
        main(*sys.argv[1:])
