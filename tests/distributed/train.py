"""Train the tiny LLaMA with the stock Trainer under torchrun: train.py KIND FOLDER BATCH.

KIND is ddp, fsdp or zero and its stage, and what more is told in MODELS and ZERO. Each rank saves
its whole weights, those of a resumed run, and what the optimizer's parameters had become.
"""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer

import hf_muon.auto  # noqa: F401
import tests.distributed.fsdp_on_cpu  # noqa: F401
from hf_muon.integrations.report import find_muon
from hf_muon.integrations.untrained import untrained
from tests.distributed.layouts import leave_together
from tests.integration.tiny import arguments, tiny_data, tiny_llama

ZERO = {
    "zero2-offload": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    # So small that every matrix is partitioned, and several sub-groups step one after the other.
    "zero3-small": {"sub_group_size": 5000, "stage3_param_persistence_threshold": 0},
}


def lora(folder, seed):
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def loaded(folder, seed):
    """From files; where the Trainer's arguments ask for ZeRO-3, never whole on any rank."""
    path = folder / f"seed{seed}"
    if torch.distributed.get_rank() == 0:
        tiny_llama(seed).save_pretrained(path)
    torch.distributed.barrier()
    model = LlamaForCausalLM.from_pretrained(path)
    assert {p.numel() for p in model.parameters()} == {0}
    return model


MODELS = {"lora": lora, "init": loaded}


def launcher(kind):
    if kind.startswith("fsdp"):
        return {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }
    if kind.startswith("zero"):
        return {
            "deepspeed": {
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": int(kind[4]), **ZERO.get(kind, {})},
                "zero_force_ds_cpu_optimizer": False,
            }
        }
    return {"ddp_backend": "gloo"}


def run(kind, folder, batch, seed=0, **resume):
    args = arguments(
        folder / "out",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        # The tiny matrices are below the size from which dividing them pays. float32, because
        # bfloat16 makes of a rounding in a gradient a thousand times as much.
        optim_args="distribute=owner,polar_dtype=float32",
        **launcher(kind),
    )
    build = MODELS.get(kind.partition("-")[2], lambda folder, seed: tiny_llama(seed))
    # A few words only, so that gradients are large enough to be clipped.
    rows = [row["input_ids"] % 8 for row in tiny_data()]
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=build(folder, seed), args=args, train_dataset=data)
    trainer.train(**resume)
    return trainer


def whole_weights(kind, trainer):
    named = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    if kind.startswith("zero3"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(named.values())):
            return {name: p.detach().clone() for name, p in named.items()}
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in named.items()
    }


def placement(trainer):
    """What launchers have put in the place of the model's parameters."""
    optimizer = find_muon(trainer.optimizer)
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    if all(isinstance(p, DTensor) for p in tensors) and tensors:
        return "sharded"
    # DeepSpeed's flat tensors; its third stage takes them out again between steps.
    return "flat" if {p.ndim for p in tensors} <= {1} else "whole"


if __name__ == "__main__":
    kind, folder, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    if kind.startswith("zero"):
        import deepspeed

        # With it, accelerate (1.15) takes DDP in the place of DeepSpeed, without a word.
        os.environ["ACCELERATE_USE_CPU"] = "false"
        # Before a model is loaded, or DeepSpeed (0.19) takes a CPU to be the only one.
        deepspeed.init_distributed("gloo")
    trainer = run(kind, folder, batch)
    checkpoint = str(folder / "out" / "checkpoint-2")
    resumed = run(kind, folder, batch, seed=1, resume_from_checkpoint=checkpoint)
    saved = {
        "weights": whole_weights(kind, trainer),
        "resumed": whole_weights(kind, resumed),
        "world_size": trainer.args.world_size,
        "placement": placement(trainer),
        "untrained": untrained(trainer.model, find_muon(trainer.optimizer)),
        "grad_norm": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
    }
    torch.save(saved, folder / f"rank{trainer.args.process_index}.pt")
    leave_together()
