"""Train the tiny LLaMA under torchrun and save each rank's weights: train_ddp.py FOLDER BATCH."""

import sys
from pathlib import Path

import torch

import hf_muon.auto  # noqa: F401
from tests.integration.tiny import tiny_llama, trained, trainer_of, weights

if __name__ == "__main__":
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "ddp_backend": "gloo",
        # The tiny matrices are below the size from which dividing them pays.
        "optim_args": "distribute=owner",
    }
    trainer = trained(folder / "out", **settings)
    resumed = trainer_of(folder / "out", model=tiny_llama(seed=1), **settings)
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    args = trainer.args
    saved = {
        "weights": weights(trainer),
        "resumed": weights(resumed),
        "world_size": args.world_size,
    }
    torch.save(saved, folder / f"rank{args.process_index}.pt")
