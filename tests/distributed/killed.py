"""Train with the stock Trainer on two ranks: killed.py FOLDER whole | killed | resumed.

``killed`` ends the second rank, without notice, in the middle of the third step.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

import hf_muon.auto  # noqa: F401
from tests.distributed.layouts import leave_together
from tests.integration.tiny import trainer_of, weights


class Kill(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    out = folder / ("whole" if how == "whole" else "killed")
    trainer = trainer_of(
        out,
        trainer_settings={"callbacks": [Kill()] if how == "killed" else []},
        save_strategy="steps",
        save_steps=2,
        ddp_backend="gloo",
        optim_args="distribute=owner",
        per_device_train_batch_size=2,
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if how == "resumed" else None)
    if trainer.args.process_index == 0:
        torch.save(weights(trainer), folder / f"{how}.pt")
    leave_together()
