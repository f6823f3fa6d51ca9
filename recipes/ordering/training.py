"""One training run of the studies: a small model, a method, a learning rate, a seed.

In: plain values, so that a run can go to another process. Out: plain values: the held-out loss, the
training curve, and the spectra of the final weights. The stock ``Trainer`` trains.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from shared.rates import AdamWAtRates, Rates
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)
from hf_muon import MuonConfig, diagnostics
from hf_muon.diagnostics.gradients import muon_matrices

sys.path.append(str(Path(__file__).parents[1] / "llama_pretrain"))  # for its data

from worlds import WORLDS, World

BETAS = (0.9, 0.95)
METHODS: dict[str, dict[str, str]] = {
    "adamw": {"optim": "adamw_torch"},
    "pre_polar": {"optim": "muon", "optim_args": "order=pre_polar"},
    "post_polar": {"optim": "muon", "optim_args": "order=post_polar"},
    "post_polar_matched": {"optim": "muon", "optim_args": "order=post_polar,match_update_rms=true"},
    "polar_only": {"optim": "muon", "optim_args": "order=polar_only"},
}


def train(
    world: str,
    method: str,
    learning_rate: float,
    seed: int,
    steps: int,
    adamw_lr: float | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """Train once.

    Args:
        world: a key of ``worlds.WORLDS``: model and data.
        method: a key of ``METHODS``.
        learning_rate: of the matrices.
        seed: of the weights and of the order of the data.
        steps: optimizer steps.
        adamw_lr: of everything else; for the method ``adamw``, None is the rate of the matrices.
        **sizes: of model and data, where they differ from the world's defaults.

    Returns:
        ``loss`` (None if the run diverged), ``stable_rank``, ``effective_rank``, ``curve``, …
    """
    chosen = WORLDS[world](steps=steps, **sizes)
    set_seed(seed)
    model = chosen.build()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(chosen, model, folder, method, learning_rate, seed, steps, adamw_lr)
        try:
            trainer.train()
        except FloatingPointError:  # hf_muon raises it for gradients with NaN
            return {"loss": None}
        found = trainer.evaluate()
        logged = trainer.state.log_history
    loss = found["eval_loss"]
    return {
        "loss": loss if math.isfinite(loss) else None,
        **{name[5:]: value for name, value in found.items() if name == "eval_accuracy"},
        **weight_spectra(model),
        "curve": [[entry["step"], entry["loss"]] for entry in logged if "loss" in entry],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "facts": chosen.facts,
    }


def trainer_of(
    world: World,
    model: nn.Module,
    folder: str,
    method: str,
    learning_rate: float,
    seed: int,
    steps: int,
    adamw_lr: float | None,
) -> Trainer:
    """Return the Trainer of a run.

    Without weight decay, because its effect scales with the learning rate, which is varied.
    """
    options, of_two_rates = dict(METHODS[method]), None
    if options["optim"] == "muon":
        options["optim_args"] += f",adamw_lr={adamw_lr!r}"
    elif adamw_lr is not None:
        rates = Rates(learning_rate, adamw_lr, adamw_lr)
        config = MuonConfig(lr=learning_rate, weight_decay=0.0, adamw_betas=BETAS)
        of_two_rates = AdamWAtRates, {"rates": rates, "config": config}
    args = TrainingArguments(
        output_dir=folder,
        **options,
        learning_rate=learning_rate,
        weight_decay=0.0,
        adam_beta2=BETAS[1],
        max_grad_norm=1.0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=0.1,  # a share of all steps
        max_steps=steps,
        per_device_train_batch_size=world.batch,
        per_device_eval_batch_size=4 * world.batch,
        seed=seed,
        logging_steps=0.05,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=world.train,
        eval_dataset=world.validation,
        data_collator=world.collate,
        compute_metrics=world.metrics,
        optimizer_cls_and_kwargs=of_two_rates,
    )
    trainer.pop_callback(PrinterCallback)  # its lines would hide the progress of the parts
    return trainer


@torch.no_grad()
def weight_spectra(model: nn.Module) -> dict[str, float]:
    """Return stable and effective rank, averaged over the matrices that Muon trains."""
    matrices = [parameter.detach().float() for parameter, _ in muon_matrices(model).values()]
    ranks = {"stable_rank": diagnostics.stable_rank, "effective_rank": diagnostics.effective_rank}
    return {
        name: sum(rank(matrix).item() for matrix in matrices) / len(matrices)
        for name, rank in ranks.items()
    }
