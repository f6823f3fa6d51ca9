"""The situations of DeepSpeed's own tests of its Muon, with ours: deepspeed_cases.py OUT.

They are those of its folders tests/unit/ops/muon and tests/unit/runtime/zero (0.19, main of
November 2026). Rank 0 writes what was seen in each. Data are the same on each rank.
"""

import sys
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

from hf_muon import create_muon_optimizer
from hf_muon.integrations.report import find_muon
from tests.distributed import training, zero
from tests.distributed.layouts import process_group

STAGES = (1, 2, 3)
DTYPES = ("bf16", "fp16")
STEPS, RESUMED_STEPS, OVERFLOWING_STEPS = 6, 2, 14
HEADS, KEY_VALUE_HEADS, LAYERS = 4, 2, 2
PARTS = {
    "all": lambda name: True,
    "without a layer": lambda name: "layers.0" not in name,
    "matrices only": lambda name: "proj" in name,
}


def precision(dtype, **more):
    """The section of a dtype. A fixed scale of 2⁴ does not overflow."""
    scale = {"initial_scale_power": 4} if dtype == "fp16" else {}
    return {} if dtype == "fp32" else {dtype: {"enabled": True, **scale, **more}}


def engine_of(config, trains=PARTS["all"], **settings):
    model = training.tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_(trains(name))
    if not config.get("zero_optimization", {}).get("stage"):
        settings["replicate_group"] = "world"
    optimizer = create_muon_optimizer(model, lr=1e-2, weight_decay=0.1, **settings)
    told = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, **config}
    told["steps_per_print"] = 10**9
    return deepspeed.initialize(model=model, optimizer=optimizer, config=told)[0]


def train(engine, steps):
    """Losses of a model that sees the same two rows again and again."""
    tokens = torch.arange(32).view(2, 16) % 30
    losses = []
    for _ in range(steps):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def weights(engine):
    named = engine.module.named_parameters()
    whole = {name: safe_get_full_fp32_param(p) for name, p in named if p.requires_grad}
    return {name: value.clone() for name, value in whole.items() if value is not None}


def momentum(engine):
    """The first moments in this rank's partitions."""
    optimizer = find_muon(engine.optimizer)
    return [state["exp_avg"].clone() for state in optimizer.state.values()]


def same(some, others):
    """Whether tensors are equal on every rank, and some."""
    here = len(some) == len(others) > 0 and all(map(torch.equal, some, others))
    everywhere = torch.tensor(int(here))
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


def resumed(stage, dtype, folder):
    """Trained on from a checkpoint, and without a stop."""
    config = {**zero.config(stage), **precision(dtype)}
    engine = engine_of(config)
    train(engine, RESUMED_STEPS)
    engine.save_checkpoint(folder, tag="half")
    saved = momentum(engine)
    train(engine, RESUMED_STEPS)
    straight = weights(engine)
    engine.destroy()
    engine = engine_of(config)
    engine.load_checkpoint(folder, tag="half")
    kept = same(momentum(engine), saved)
    train(engine, RESUMED_STEPS)
    result = {"straight": straight, "resumed": weights(engine), "kept": kept}
    engine.destroy()
    return result


def overflowing(stage):
    """Steps that the loss scaler discards, until the scale fits."""
    scale = {"initial_scale_power": 24, "hysteresis": 1}
    engine = engine_of({**zero.config(stage), **precision("fp16", **scale), "gradient_clipping": 1})
    before = {name: p.detach().clone() for name, p in weights(engine).items()}
    kept, losses = [], []
    for _ in range(OVERFLOWING_STEPS):
        skipped, last = engine.skipped_steps, momentum(engine)
        losses += train(engine, 1)
        if last:  # none before the first step that counts
            kept.append((engine.skipped_steps > skipped, same(momentum(engine), last)))
        if engine.global_steps == OVERFLOWING_STEPS - 4:
            engine.optimizer.loss_scaler.cur_scale = 2.0**24  # which overflows after other steps
    result = {"before": before, "after": weights(engine), "losses": losses, "kept": kept}
    result["finite"] = all(bool(m.isfinite().all()) for m in momentum(engine))
    engine.destroy()
    return result


def counted(counts, config, steps=STEPS, **settings):
    """Polar factors of a step on all ranks together, and the losses."""
    engine = engine_of(config, **settings)
    counts.clear()
    losses = train(engine, steps)
    computed = torch.tensor(counts["computed"])
    dist.all_reduce(computed)
    result = {"a step": int(computed) / steps, "losses": losses, "weights": weights(engine)}
    engine.destroy()
    return result


def of_a_part(stage, trains):
    engine = engine_of(zero.config(stage), trains)
    start = {name: p for name, p in training.tiny_llama().named_parameters()}
    losses = train(engine, 3)
    moved = {name for name, p in weights(engine).items() if not torch.equal(p, start[name])}
    engine.destroy()
    return {"moved": moved, "losses": losses}


def refused():
    """All that is trained is AdamW's."""
    try:
        engine_of(zero.config(2), lambda name: "proj" not in name)
    except ValueError as error:
        return str(error)
    return "nothing"


def main(out):
    counts = zero.count_matrices()
    bf16, per_head = precision("bf16"), {"split_heads": True}
    results = {"refused": refused()}
    for stage in STAGES:
        for dtype in DTYPES:
            folder = f"{out}.{stage}.{dtype}"
            results["resumed", stage, dtype] = resumed(stage, dtype, folder)
        results["overflow", stage] = overflowing(stage)
        for name, settings in (("whole", {}), ("per head", per_head)):
            config = {**zero.config(stage), **bf16}
            results[name, stage] = counted(counts, config, **settings)
    for dtype in ("fp32", "fp16"):  # zero_bfloat16.py has bfloat16
        results["stage 0", dtype] = counted(counts, precision(dtype), steps=2)
    accumulated = {"data_types": {"grad_accum_dtype": "fp32"}}
    results["accumulated"] = counted(counts, {**zero.config(2), **bf16, **accumulated})
    for part, trains in PARTS.items():
        results["part", part] = of_a_part(2, trains)
    if dist.get_rank() == 0:
        torch.save(results, out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # DeepSpeed asks the processor for instructions for float16, which torch does without.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo")
    with process_group():
        main(sys.argv[1])
