"""Train under the stock Trainer with QK-clip: qk_clip.py FOLDER BATCH KIND ….

KIND is as in train.py, and "none" for a run without the clip. Each rank saves, for each kind and
optimizer, its whole weights, what was logged and, under DeepSpeed, the copies in float32.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer

import hf_muon.auto  # noqa: F401
import tests.distributed.fsdp_on_cpu  # noqa: F401
from hf_muon import QKClip
from tests.distributed.layouts import leave_together
from tests.distributed.train import launcher, whole_weights
from tests.integration.test_qk_clip import TAU, deepseek, llama
from tests.integration.tiny import arguments, tiny_data

MODELS = {"llama": llama, "deepseek": deepseek}
STEPS = 3


def run(kind, folder, batch, model, optim, **settings):
    """Train on the same rows of four, whatever the number of ranks."""
    clips = [] if kind == "none" else [QKClip(TAU, every=1)]
    more = launcher("ddp" if kind == "none" else kind.removesuffix("-bf16"))
    if "deepspeed" in more:
        more["deepspeed"]["zero_allow_untested_optimizer"] = True
    if "fsdp_config" in more:
        layer = {"llama": "LlamaDecoderLayer", "deepseek": "DeepseekV3DecoderLayer"}[model]
        more["fsdp_config"]["transformer_layer_cls_to_wrap"] = [layer]
    args = arguments(
        folder / "out",
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        optim=optim,
        learning_rate=1e-3,
        optim_args="polar_dtype=float32" if optim == "muon" else None,
        bf16=kind.endswith("-bf16"),
        **more,
    )
    built = MODELS[model](2)
    trainer = Trainer(model=built, args=args, train_dataset=tiny_data(4), callbacks=clips)
    trainer.train()
    saved = {
        "weights": {n: w.float() for n, w in whole_weights(kind, trainer).items()},
        "logged": [
            one["max_attention_logit"]
            for one in trainer.state.log_history
            if "max_attention_logit" in one
        ],
    }
    if kind.startswith("zero"):
        from deepspeed.utils import safe_get_full_fp32_param

        named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        saved["masters"] = {
            n: safe_get_full_fp32_param(p).view(saved["weights"][n].shape).clone() for n, p in named
        }
    return saved


def main(folder, batch, kinds):
    saved = {}
    for kind in kinds:
        for model in MODELS:
            for optim in ("muon", "adamw_torch"):
                saved[kind, model, optim] = run(kind, folder, batch, model, optim)
    torch.save(saved, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3].startswith("zero"):
        import deepspeed

        os.environ["ACCELERATE_USE_CPU"] = "false"  # as in train.py
        deepspeed.init_distributed("gloo")
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    leave_together()
