"""The report of a pretraining run: losses over tokens, and tokens per second.

In: a ``Trainer`` after training. Out: the content of ``results.json``, except model and data.
"""

from __future__ import annotations

from typing import Any

import datasets
from shared import measure
from speed import Rates
from transformers import Trainer


def run_results(trainer: Trainer, clock: measure.StepClock, rates: Rates) -> dict[str, Any]:
    """Return the facts of the finished training; the caller adds model and data."""
    history, speed = trainer.state.log_history, clock.steps_per_second()
    tokens_per_step = rates.tokens_per_step
    unknown = {"tokens_per_second": None, "model_flops_utilisation": None}
    return measure.run_results(trainer, clock) | {
        "tokens": trainer.state.global_step * tokens_per_step,
        **(unknown | (rates.at(speed) if speed else {})),
        "flops_per_token": rates.flops_per_token,
        "train_curve": over_tokens(measure.curve(history, loss="loss"), tokens_per_step),
        "eval_curve": over_tokens(measure.curve(history, loss="eval_loss"), tokens_per_step),
    }


def over_tokens(curve: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, Any]]:
    """Return a curve with the number of tokens at each step."""
    return [{**point, "tokens": point["step"] * tokens_per_step} for point in curve]


def exact_loss(trainer: Trainer, blocks: datasets.Dataset) -> float:
    """Return the mean loss over all blocks, whatever the number of processes.

    Processes that evaluate together pad the last round of batches with repeated blocks, which would
    count twice. So the blocks of an incomplete round are evaluated one by one.
    """
    args = trainer.args
    rest = len(blocks) % (args.per_device_eval_batch_size * args.world_size)
    if args.world_size == 1 or rest == 0:
        return mean_loss(trainer, blocks)
    whole = len(blocks) - rest
    batch, args.per_device_eval_batch_size = args.per_device_eval_batch_size, 1
    total = rest * mean_loss(trainer, blocks.select(range(whole, len(blocks))))
    args.per_device_eval_batch_size = batch
    if whole:
        total += whole * mean_loss(trainer, blocks.select(range(whole)))
    return total / len(blocks)


def mean_loss(trainer: Trainer, blocks: datasets.Dataset) -> float:
    """Return the loss that the Trainer measures on blocks."""
    return trainer.evaluate(blocks, metric_key_prefix="final")["final_loss"]
