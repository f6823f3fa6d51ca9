"""A training that ends with a comparison: the model before and after it.

In: a ``Trainer``, functions that measure the model, and samples of its output. Out: in
``--output_dir`` the model and ``results.json``; on the screen the samples, and each measure before
and after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from shared import measure, preemption
from shared.arguments import RecipeError, checkpoint
from shared.processes import check_sharding, forget_evaluation, leave_together
from shared.progress import use_quiet_progress


def train(
    trainer: Trainer,
    measured: Callable[[], dict[str, float]],
    samples: Callable[[], list[str]],
    **facts: Any,
) -> dict[str, Any] | None:
    """Measure, train, measure again, save, and return the results.

    Args:
        trainer: a Trainer that has not trained yet.
        measured: measures the trainer's model as it is, on held-out rows; all ranks call it.
        samples: shows the trained model's output in a few lines.
        **facts: further entries of the results.

    Returns:
        The results; None when a signal stopped the training, after a checkpoint was saved.
    """
    check_sharding(trainer)
    clock = measure.StepClock()
    trainer.add_callback(clock)
    use_quiet_progress(trainer)
    before = measured()
    forget_evaluation(trainer)
    if not preemption.train(trainer, checkpoint(trainer.args)):
        leave_together(trainer)
        return None
    found = {"before": before, "after": measured(), "samples": samples()}
    results = measure.run_results(trainer, clock) | facts | found
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        measure.write_json(folder / "results.json", results)
        trainer.save_state()
        changes = [f"{name} {old:.3f} → {found['after'][name]:.3f}" for name, old in before.items()]
        print("\n".join([*found["samples"], f"{results['optim']}: {', '.join(changes)}; {folder}"]))
    leave_together(trainer)
    return results


def ended(main: Callable[[list[str]], object]) -> None:
    """Run a recipe with the command line's arguments; print mistakes as one sentence."""
    try:
        main(sys.argv[1:])
    except (RecipeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
