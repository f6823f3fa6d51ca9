"""A ``LightningModule`` whose ``configure_optimizers`` returns Muon.

In: ``python lightning_module.py [--steps 60] [--stop_at 30] [--resume] [--devices 2]``. Out: the
held-out loss before and after, a sample, and Lightning's checkpoint in ``--folder``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from bytes_llama import build_model, held_out_loss, rows, sample
from torch.utils.data import DataLoader

from hf_muon import create_muon_optimizer


class ByteModel(lightning.LightningModule):
    """The model, its loss and its optimizer."""

    def __init__(self, lr: float, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build_model()

    def train_dataloader(self) -> DataLoader:
        """Return the numbers of the steps, each of which determines its rows."""
        return DataLoader(range(self.hparams.steps))

    def training_step(self, _: torch.Tensor, number: int) -> torch.Tensor:
        """Return the loss of a batch (rows, length); a resumed run continues with the next one."""
        batch = rows(self.global_step, self.global_rank, self.trainer.world_size).to(self.device)
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Return Muon, and a schedule that Lightning steps after each step."""
        # "world": under DDP every process holds a copy of each tensor.
        optimizer = create_muon_optimizer(
            self, lr=self.hparams.lr, weight_decay=0.1, replicate_group="world"
        )
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, 0.1, total_iters=self.hparams.steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main(argv: list[str]) -> tuple[float, float]:
    """Train, save, and return the held-out loss before and after."""
    args = parse(argv)
    lightning.seed_everything(0)
    module = ByteModel(args.lr, args.steps)
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(args.folder, save_last=True)
    trainer = lightning.Trainer(
        max_steps=args.stop_at or args.steps,
        devices=args.devices,
        gradient_clip_val=1.0,
        callbacks=[checkpoint],
        default_root_dir=args.folder,
        logger=False,
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    before = held_out_loss(module.model)
    last = args.folder / "last.ckpt" if args.resume else None
    trainer.fit(module, ckpt_path=last)
    after = held_out_loss(module.model)
    print(f"{sample(module.model)}\nheld-out loss {before:.3f} → {after:.3f}")
    return before, after


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--stop_at", type=int, help="save and stop before the last step")
    parser.add_argument("--folder", type=Path, default=Path("runs/ecosystem/lightning"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--devices", default="auto", help="how many; on a CPU, processes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
