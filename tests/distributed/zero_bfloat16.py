"""Train the tiny LLaMA in bfloat16 under DeepSpeed, with the same data on each rank:
zero_bfloat16.py ORDERS OUT.

Averages of equal gradients are exact on two ranks, so that one process must train the same weights.
Rank 0 writes for each order and kind the float32 weights, DeepSpeed's class around the optimizer,
and how many polar factors were computed.
"""

import sys
import warnings

import torch
import torch.distributed as dist

import hf_muon.optimizer.muon
from hf_muon import create_muon_optimizer
from tests.distributed import training, zero
from tests.distributed.layouts import process_group

BATCH, STEPS = 4, training.STEPS
# kind -> stage, config of DeepSpeed, and the class that it puts around the optimizer (0.19).
KINDS = {
    "stage 0": (0, {}, "FP16_UnfusedOptimizer"),
    "stage 0, resumed": (0, {}, "FP16_UnfusedOptimizer"),
    "stage 1, accumulated in float32": (
        1, {"data_types": {"grad_accum_dtype": "fp32"}}, "BF16_Optimizer",
    ),
    "stage 1": (1, {}, "DeepSpeedZeroOptimizer"),
    "stage 2": (2, {}, "DeepSpeedZeroOptimizer"),
    "stage 3": (3, {}, "DeepSpeedZeroOptimizer_Stage3"),
}  # fmt: skip
STEPPED_WHEN_BUILT = "stage 0, stepped when it was built"  # the control


def batches():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 30, (STEPS, BATCH, 16), generator=generator)


def alone(order):
    """One process: a bfloat16 model and float32 weights that are trained."""
    model = training.tiny_llama()
    for p in model.parameters():
        p.data = p.data.bfloat16()
    half = dict(model.named_parameters())
    weights = training.tiny_llama()
    for name, p in weights.named_parameters():
        p.data = half[name].detach().float()
    optimizer = create_muon_optimizer(weights, order=order, **training.SETTINGS)
    for tokens in batches():
        model(input_ids=tokens, labels=tokens).loss.backward()
        for name, p in weights.named_parameters():
            p.grad, half[name].grad = half[name].grad.float(), None
        optimizer.step()
        for name, p in weights.named_parameters():
            half[name].data.copy_(p.data)
    return {name: p.detach().clone() for name, p in weights.named_parameters()}


def engine_of(stage, more, order):
    import deepspeed

    model = training.tiny_llama()
    told = {"replicate_group": "world", "distribute": "owner"} if stage == 0 else {}
    optimizer = create_muon_optimizer(model, order=order, **told, **training.SETTINGS)
    config = {
        **zero.config(stage),
        **more,
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,  # a factor that differs by a rounding moves bfloat16 weights
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(stage, more, order, folder=None):
    """Train; with a folder, halfway on from a checkpoint in it."""
    engine = engine_of(stage, more, order)
    for number, tokens in enumerate(batches()):
        if folder and number == STEPS // 2:
            engine.save_checkpoint(folder)
            engine.destroy()
            engine = engine_of(stage, more, order)
            engine.load_checkpoint(folder)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    result = {"weights": master_weights(engine), "wrapper": type(engine.optimizer).__name__}
    engine.destroy()
    return result


def master_weights(engine):
    from deepspeed.utils import safe_get_full_fp32_param

    copies = {}
    if hasattr(engine.optimizer, "fp32_groups"):  # stage 0 has a float32 copy of each parameter
        wrapper = engine.optimizer
        for half, full in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            copies.update({id(p): copy for p, copy in zip(half, full, strict=True)})
    return {
        name: (copies[id(p)] if copies else safe_get_full_fp32_param(p)).detach().clone()
        for name, p in engine.module.named_parameters()
    }


def main(orders, out):
    results = {}
    counts = zero.count_matrices()

    def record(order, kind, stage, more):
        counts.clear()
        folder = f"{out}.{order}" if kind.endswith("resumed") else None
        result = train(stage, more, order, folder)
        computed = torch.tensor(counts["computed"])
        dist.all_reduce(computed)
        results[order, kind] = {**result, "computed": int(computed)}

    for order in orders.split(","):
        for kind, (stage, more, _) in KINDS.items():
            record(order, kind, stage, more)
    hf_muon.optimizer.muon.is_rehearsal = lambda entries, state: False
    record(order, STEPPED_WHEN_BUILT, 0, {})
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    import deepspeed

    warnings.simplefilter("ignore")
    deepspeed.init_distributed("gloo")
    with process_group():
        main(*sys.argv[1:])
