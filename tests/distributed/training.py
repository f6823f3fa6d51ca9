"""Train a tiny LLaMA forward and backward on a part of each batch per rank: training.py KINDS OUT.

KINDS is a list like ``zero2,zero3`` of what to run; each runs the cases it has. Rank 0 writes for
each the whole weights and the gradient norms.
"""

import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hf_muon import create_muon_optimizer
from tests.distributed.layouts import process_group

VOCABULARY, BATCH, STEPS = 131, 24, 5
SETTINGS = {"lr": 2e-3, "adamw_lr": 1e-3, "weight_decay": 0.1, "polar_dtype": "float32"}
ORDERS = {order: {"order": order} for order in ("pre_polar", "post_polar", "polar_only")}
# LoRA factors on all linear layers, trained through their product. ``tangent`` with exact polar
# factors: its three iterations of a polynomial multiply rounding of the gradient by thousands.
PAIRS = {
    "product": {"lora_update": "product", "adapters": True},
    "tangent": {
        "lora_update": "tangent", "tangent_balance_every": 2, "polar_method": "svd",
        "adapters": True,
    },
}  # fmt: skip
# Cases that one process trains as well: optimizer settings, "accumulation" and "adapters".
CASES = {**ORDERS, "accumulated": {"accumulation": 2}, **PAIRS}
# How they are launched: kind -> case -> settings of the launcher.
ORDINARY = {case: {} for case in CASES}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
VARIANTS = {
    "zero0": {case: {} for case in (*ORDERS, *PAIRS)},
    "zero3 in small groups": {
        "pre_polar": {"sub_group_size": 9000, "stage3_param_persistence_threshold": 0}
    },
    "zero2 overlapped": {
        "pre_polar": {"overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": False}
    },
    **{f"zero{stage} offloaded": {"pre_polar": OFFLOAD} for stage in (1, 2, 3)},
    "fsdp offloaded": {"pre_polar": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}},
}


def cases(kind):
    return VARIANTS.get(kind, ORDINARY)


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def with_adapters(model):
    """Adapters of rank 4, with a scaling of 2, of a frozen model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def batches(accumulation):
    """(steps, accumulation, ranks, sequences, tokens), the same sequences for every world."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    generator = torch.Generator().manual_seed(1)
    # A few words only, so that the gradient is large enough to be clipped.
    tokens = torch.randint(0, 30, (STEPS, BATCH, 16), generator=generator)
    return tokens.view(STEPS, accumulation, world, -1, 16)


def train(kind, launcher=None, accumulation=1, adapters=False, **settings):
    """Whole weights that were trained, and gradient norms, after some steps."""
    run = _with_deepspeed if kind.startswith("zero") else _in_a_loop
    model = with_adapters(tiny_llama()) if adapters else tiny_llama()
    return run(model, kind, launcher or {}, accumulation, {**SETTINGS, **settings})


def _in_a_loop(model, kind, launcher, accumulation, settings):
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if kind == "ddp":
        wrapped, settings = DistributedDataParallel(model), {**settings, "replicate_group": "world"}
    elif kind != "one":
        shape, names = ((2, world // 2), ("r", "s")) if kind == "hsdp" else ((world,), ("s",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh, **launcher)
        wrapped = fully_shard(model, mesh=mesh, **launcher)
    else:
        wrapped = model
    optimizer = create_muon_optimizer(model, distribute="owner", **settings)
    norms = []
    for step in batches(accumulation):
        for index, parts in enumerate(step):
            last = index == accumulation - 1
            waits = wrapped.no_sync() if kind == "ddp" and not last else nullcontext()
            with waits:
                loss = wrapped(input_ids=parts[rank], labels=parts[rank]).loss / accumulation
                loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "norms": norms,
        "weights": {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        },
        "sharded": {isinstance(p, DTensor) for p in model.parameters()},
    }


def _with_deepspeed(model, kind, launcher, accumulation, settings):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    stage = int(kind[4])
    config = {
        "train_micro_batch_size_per_gpu": BATCH // accumulation // dist.get_world_size(),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, **launcher},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    told = {"replicate_group": "world"} if stage == 0 else {}
    optimizer = create_muon_optimizer(model, **told, **settings)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    norms = []
    for step in batches(accumulation):
        for parts in step:
            tokens = parts[dist.get_rank()]
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        norm = engine.get_global_grad_norm()  # None where DeepSpeed does not wrap the optimizer
        norms.append(norm if norm is None else float(norm))
    weights = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        whole = safe_get_full_fp32_param(p)
        weights[name] = (p if whole is None else whole).detach().clone()
    engine.destroy()
    return {"norms": norms, "weights": weights, "sharded": set()}


def main(kinds, out):
    results = {
        (kind, case): train(kind, launcher, **CASES[case])
        for kind in kinds.split(",")
        for case, launcher in cases(kind).items()
    }
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    if "zero" in sys.argv[1]:
        import deepspeed

        deepspeed.init_distributed("gloo")
    with process_group():
        main(*sys.argv[1:])
