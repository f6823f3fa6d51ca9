"""Train under the stock Trainer with a SpectralMonitor: monitor.py KIND FOLDER BATCH.

KIND is as in train.py. Each order trains with the monitor, whose file stays in the folder; the
first one without it too. One process also writes down its gradients. Each rank saves its whole
weights.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from hf_muon import SpectralMonitor
from tests.distributed.layouts import leave_together
from tests.distributed.train import launcher, placement, whole_weights
from tests.integration.recorder import Recorder
from tests.integration.tiny import arguments, tiny_data, tiny_llama
from tests.reference.spectra import stable_rank

ORDERS = ("pre_polar", "post_polar")
LAYERS = (r"layers\.0\.mlp", r"layers\.1\.self_attn\.[kv]")
STEPS, EVERY = 8, 4


WATCHED = "model.layers.0.mlp.down_proj"


class Inputs(TrainerCallback):
    """What goes into one layer on this rank, step by step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.rows = {}
        layer = model.get_submodule(WATCHED)
        layer.register_forward_hook(lambda _, inputs, __: self.rows[self.step].append(inputs[0]))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1
        self.rows[self.step] = []

    def stable_ranks(self):
        rows = {
            step: torch.cat([x.flatten(0, 1) for x in inputs]) for step, inputs in self.rows.items()
        }
        return {step: stable_rank(A.detach()) for step, A in rows.items()}


def run(kind, folder, batch, order, *callbacks):
    args = arguments(
        folder / order,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        # As in train.py: so that the work is divided, and roundings stay small.
        optim_args=f"order={order},distribute=owner,polar_dtype=float32",
        **launcher(kind),
    )
    rows = [row["input_ids"] % 24 for row in tiny_data()]
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    return trainer


def main(kind, folder, batch):
    plain = run(kind, folder, batch, ORDERS[0])
    saved = {
        "world_size": plain.args.world_size,
        "placement": placement(plain),
        "plain": whole_weights(kind, plain),
    }
    for order in ORDERS:
        recorder = Recorder()
        recorders = [recorder] if plain.args.world_size == 1 else []
        monitor, inputs = SpectralMonitor(LAYERS, every=EVERY), Inputs()
        trainer = run(kind, folder, batch, order, *recorders, inputs, monitor)
        saved[order] = {
            "weights": whole_weights(kind, trainer),
            "inputs": inputs.stable_ranks(),
            "logged": [r for r in trainer.state.log_history if any("muon/" in key for key in r)],
        }
        if recorders:
            names = [name for name, p in trainer.model.named_parameters() if p.ndim == 2]
            saved[order]["histories"] = {n: recorder.history(n, order=order) for n in names}
    torch.save(saved, folder / f"rank{trainer.args.process_index}.pt")


if __name__ == "__main__":
    kind, folder, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    if kind.startswith("zero"):
        import deepspeed

        os.environ["ACCELERATE_USE_CPU"] = "false"  # as in train.py
        deepspeed.init_distributed("gloo")
    main(kind, folder, batch)
    leave_together()
