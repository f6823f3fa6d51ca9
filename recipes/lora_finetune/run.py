"""Fine-tune adapters of a pretrained model with the stock ``Trainer``.

In: ``python run.py configs/minilm_sentiment.yaml [--optim muon] [--learning_rate 0.002] ...``.
Out: in ``--output_dir``, ``results.json`` and ``adapter/``, which stock PEFT loads, and checkpoints
on request; on the screen, three held-out rows with the model's answers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import chat
import classification
import settings
from shared import measure, preemption
from shared.arguments import RecipeError, checkpoint
from shared.processes import check_sharding, leave_together
from shared.progress import quiet_libraries, use_quiet_progress
from shared.rates import adamw_at_rates
from transformers import Trainer, TrainingArguments, set_seed

import examples
import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

TASKS = {"classification": classification, "chat": chat}


def main(argv: list[str]) -> dict[str, Any] | None:
    """Train, evaluate on the held-out rows, write the results, and return them.

    Returns None when a signal stopped the training, after a checkpoint was saved.
    """
    started = time.perf_counter()
    model, data, args, rates = settings.parse(argv)
    quiet_libraries()
    set_seed(args.seed)  # a new head and LoRA's A are random
    trainer, facts = TASKS[model.task].build(model, data, args)
    trainer.optimizer_cls_and_kwargs = adamw_at_rates(args, rates)
    check_sharding(trainer)
    clock = measure.StepClock()
    trainer.add_callback(clock)
    use_quiet_progress(trainer)
    announce(facts, args)
    if not preemption.train(trainer, checkpoint(args)):
        leave_together(trainer)
        return None
    final = trainer.evaluate(metric_key_prefix="final")
    speed = clock.steps_per_second()
    told = examples.examples(
        trainer,
        data.split().validation,
        lambda rows: TASKS[model.task].encoded(rows, trainer.processing_class, data.max_tokens),
    )
    results = measure.run_results(trainer, clock) | {
        "model": vars(model),
        "data": vars(data),
        **vars(rates),
        **facts,
        "train_curve": measure.curve(trainer.state.log_history, loss="loss"),
        "eval_curve": measure.curve(
            trainer.state.log_history, loss="eval_loss", accuracy="eval_accuracy"
        ),
        "validation_loss": final["final_loss"],
        "validation_accuracy": final.get("final_accuracy"),
        "examples": told,
        "seconds_per_step": round(1 / speed, 4) if speed else None,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    save(trainer, Path(args.output_dir), results)
    leave_together(trainer)
    return results


def announce(facts: dict[str, Any], args: TrainingArguments) -> None:
    """Print what the run trains, and what a constant answer would reach."""
    if args.process_index == 0:
        base = ""
        if "base_accuracy" in facts:
            base = f"; a constant answer has accuracy {facts['base_accuracy']:.1%}"
        print(
            f"{facts['trained_parameters']:,} of {facts['parameters']:,} parameters train on "
            f"{facts['train_rows']:,} rows, {facts['validation_rows']:,} held out{base}"
        )


def save(trainer: Trainer, folder: Path, results: dict[str, Any]) -> None:
    """Write the adapter and the results, and print a summary."""
    trainer.save_model(str(folder / "adapter"))
    if not trainer.is_world_process_zero():
        return
    measure.write_json(folder / "results.json", results)
    trainer.save_state()
    accuracy = results["validation_accuracy"]
    print(examples.shown(results["examples"]))
    print(
        f"{results['optim']}: validation loss {results['validation_loss']:.4f}"
        + (f", accuracy {accuracy:.1%}" if accuracy is not None else "")
        + f"; {folder / 'results.json'}, {folder / 'adapter'}"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RecipeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
