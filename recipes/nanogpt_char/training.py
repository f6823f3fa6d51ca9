"""One training of nanoGPT's character model for CPUs, with the stock ``Trainer``.

In: a text, and a run of the study. Out: the validation loss, its curve, CPU seconds. Everything
except the optimizer is as nanoGPT's readme has it for a CPU (block 64, batch 12, 4 layers, 4 heads,
width 128, no dropout, no biases):
https://github.com/karpathy/nanoGPT/blob/master/config/train_shakespeare_char.py
"""

from __future__ import annotations

import math
import tempfile
import time
from typing import Any

import torch
from shared.rates import Rates, adamw_at, muon_at
from study.records import Run
from text import Text, drawn, side_by_side
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_muon import MuonConfig

BLOCK, BATCH, WIDTH, LAYERS, HEADS = 64, 12, 128, 4, 4
WARMUP, SMALLEST_RATE = 0.05, 0.1
"""Share of the steps, 100 of 2,000; share of the peak rate at which the cosine ends."""
BETAS = (0.9, 0.99)
CURVE_POINTS, CURVE_WINDOWS = 8, 20 * BATCH
"""nanoGPT evaluates every 250 steps on 20 batches; here they are the same ones every time."""


def model_of(characters: int) -> GPT2LMHeadModel:
    """Return the untrained model, from the global seed: GPT-2 with its biases fixed at zero."""
    config = GPT2Config(
        vocab_size=characters,
        n_positions=BLOCK,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu",  # exact, as nn.GELU
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_(False)
    return model


def optimizer_of(model: GPT2LMHeadModel, run: Run) -> torch.optim.Optimizer:
    """Return the optimizer of a run.

    A run's settings are those of ``MuonConfig``, plus ``optimizer``: ``adamw`` or ``muon``. Its
    point has three rates, weight decay, and momentum: Muon's β, or AdamW's β₁ on the matrices.
    """
    settings, point = dict(run.settings), run.point
    rates = Rates(point["rate"], point["embedding_rate"], point["rest_rate"])
    common = {"lr": rates.matrices, "weight_decay": point["weight_decay"]}
    if settings.pop("optimizer") == "adamw":
        betas = (point["momentum"], BETAS[1])
        return adamw_at(model, rates, MuonConfig(**common, adamw_betas=betas))
    if "momentum" in point:
        settings["momentum"] = point["momentum"]
    return muon_at(model, rates, MuonConfig(**common, adamw_betas=BETAS, **settings))


def train(text: Text, run: Run) -> dict[str, Any]:
    """Train once.

    Args:
        text: to train and to validate on.
        run: its cell has ``steps`` and, for a quick run, ``held_out``: validation windows.

    Returns:
        ``loss`` on all validation windows (None if the run diverged), ``curve``, ``seconds``.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    steps, few = run.cell["steps"], run.cell.get("held_out")
    set_seed(run.seed)
    model = model_of(len(text.characters))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=arguments(folder, run, steps),
            train_dataset=drawn(text.train, steps * BATCH, BLOCK, run.seed),
            eval_dataset=side_by_side(text.validation, BLOCK, few or CURVE_WINDOWS),
            data_collator=default_data_collator,
            optimizers=(optimizer_of(model, run), None),
        )
        trainer.pop_callback(PrinterCallback)
        loss = math.inf
        try:
            trainer.train()
            held_out = side_by_side(text.validation, BLOCK, few)
            loss = trainer.evaluate(held_out, metric_key_prefix="final")["final_loss"]
        except FloatingPointError:  # hf_muon raises it for gradients with NaN
            pass
        logged = trainer.state.log_history
    return {
        "loss": loss if math.isfinite(loss) else None,
        "curve": [[e["step"], round(e["eval_loss"], 4)] for e in logged if "eval_loss" in e],
        "seconds": round(time.process_time() - started, 1),
    }


def arguments(folder: str, run: Run, steps: int) -> TrainingArguments:
    """Return the Trainer's arguments; the rates are the optimizer's."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=8 * BATCH,
        learning_rate=run.point["rate"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": SMALLEST_RATE},
        warmup_steps=round(WARMUP * steps),
        max_grad_norm=1.0,
        seed=run.seed,
        eval_strategy="steps",
        eval_steps=max(1, steps // CURVE_POINTS),
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
