"""Train the tiny LLaMA under torchrun and save each rank's weights: train_ddp.py FOLDER BATCH."""

import sys
from pathlib import Path

import torch

import hf_muon.auto  # noqa: F401
from tests.integration.tiny import trained, weights

if __name__ == "__main__":
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    trainer = trained(
        folder / "out",
        per_device_train_batch_size=batch,
        save_strategy="steps",
        save_steps=2,
        ddp_backend="gloo",
    )
    args = trainer.args
    torch.save(
        {"weights": weights(trainer), "world_size": args.world_size},
        folder / f"rank{args.process_index}.pt",
    )
