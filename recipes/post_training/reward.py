"""A reward model with TRL's ``RewardTrainer``: a good mood ranks above a bad one.

In: ``python reward.py configs/reward.yaml [--r 8] [--model smollm2] [--dataset owner/name] ...``; a
dataset has ``chosen`` and ``rejected``, with or without ``prompt``. Out: see ``method.py``.
"""

import datasets
import torch
from method import Method
from moods import preferences
from transformers import Trainer
from trl import RewardConfig, RewardTrainer


@torch.no_grad()
def ranked(trainer: Trainer, rows: datasets.Dataset) -> list[str]:
    """Return the rewards of the first three pairs."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    lines = []
    for row in trainer.eval_dataset.select(range(min(3, len(trainer.eval_dataset)))):
        for kind in ("chosen", "rejected"):
            ids = torch.tensor([row[f"{kind}_ids"]], device=model.device)
            text = trainer.processing_class.decode(ids[0], skip_special_tokens=True)
            lines.append(f"{kind} {model(input_ids=ids).logits.item():+.2f}: {text!r}")
    return lines


METHOD = Method(
    config=RewardConfig,
    trainer=RewardTrainer,
    packaged=preferences,
    measures={"loss": "loss", "accuracy": "accuracy"},
    samples=ranked,
    task="SEQ_CLS",
)

if __name__ == "__main__":
    METHOD.run()
