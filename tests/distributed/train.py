"""Train the tiny LLaMA with the stock Trainer under torchrun: train.py KIND FOLDER BATCH.

KIND is ddp, fsdp, or fsdp-lora. Each rank saves its whole weights, those of a resumed run, and
whether the optimizer's parameters were sharded.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import hf_muon.auto  # noqa: F401
import tests.distributed.fsdp_on_cpu  # noqa: F401
from hf_muon.integrations.report import find_muon
from tests.integration.tiny import tiny_llama, trainer_of


def model_of(kind, seed):
    if not kind.endswith("lora"):
        return tiny_llama(seed)
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def run(kind, folder, batch, seed=0, **resume):
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "ddp_backend": "gloo",
        # The tiny matrices are below the size from which dividing them pays.
        "optim_args": "distribute=owner",
    }
    if kind.startswith("fsdp"):
        settings["fsdp"] = "full_shard auto_wrap"
        settings["fsdp_config"] = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "SHARDED_STATE_DICT",
        }
    trainer = trainer_of(folder, model=model_of(kind, seed), **settings)
    trainer.train(**resume)
    return trainer


def whole_weights(trainer):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }


if __name__ == "__main__":
    kind, folder, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    trainer = run(kind, folder / "out", batch)
    checkpoint = str(folder / "out" / "checkpoint-2")
    resumed = run(kind, folder / "out", batch, seed=1, resume_from_checkpoint=checkpoint)
    args = trainer.args
    groups = find_muon(trainer.optimizer).param_groups
    saved = {
        "weights": whole_weights(trainer),
        "resumed": whole_weights(resumed),
        "world_size": args.world_size,
        "sharded": {isinstance(p, DTensor) for group in groups for p in group["params"]},
        "grad_norm": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
    }
    torch.save(saved, folder / f"rank{args.process_index}.pt")
