"""Pretrain a LLaMA from scratch with the stock ``Trainer``.

In: ``python run.py configs/tiny.yaml [--optim muon] [--learning_rate 0.01] ...``.
Out: in ``--output_dir``, ``results.json``, ``trainer_state.json`` and ``loss.png``, and checkpoints
on request. After SIGTERM or SIGUSR1 there is a checkpoint instead, from which training resumes
exactly.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

import figure
import packing
import results as reporting
import sample as sampling
import settings
from launch import DIVERGED
from pretraining_data import PretrainingData, prepare
from shared import preemption
from shared.arguments import RecipeError, checkpoint
from shared.measure import StepClock, write_json
from shared.processes import check_sharding, leave_together
from shared.progress import quiet_libraries, use_quiet_progress
from shared.rates import adamw_at_rates
from speed import LogSpeed, Rates, flops_per_token, peak_tflops
from stream import keep_place
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, set_seed

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)


def main(argv: list[str]) -> None:
    """Train, evaluate on all held-out blocks, and write the results."""
    started = time.perf_counter()
    model_settings, data_settings, args, rate_settings = settings.parse(argv)
    quiet_libraries()
    say(f"loading {data_settings.corpus}", args)
    with args.main_process_first(desc="tokenizer"):
        data = prepare(data_settings, args.max_steps)
    announce(data.description, args)
    set_seed(args.seed)
    model = build_model(model_settings, data)
    clock = StepClock()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=packing.evenly_spread(data.validation, data_settings.eval_blocks),
        data_collator=packing.collate,
        callbacks=[clock],
        optimizer_cls_and_kwargs=adamw_at_rates(args, rate_settings),
    )
    check_sharding(trainer)
    use_quiet_progress(trainer)
    rates = rates_of(model, data_settings, args)
    # First, because reporters only see what is in a log when they are called.
    trainer.callback_handler.callbacks.insert(0, LogSpeed(clock, rates))
    begin = checkpoint(args)
    keep_place(trainer, data_settings.tokens_per_step // data_settings.seq_len, begin)
    if not preemption.train(trainer, begin):
        leave_together(trainer)
        return
    results = reporting.run_results(trainer, clock, rates)
    results["model"] = vars(model_settings) | {"parameters": model.num_parameters()}
    results["data"] = data.description
    results.update(vars(rate_settings))
    say(f"evaluating on {data.description['validation_tokens']:,} held-out tokens", args)
    results["final_validation_loss"] = reporting.exact_loss(trainer, data.validation)
    written = sampling.sample(trainer, data.tokenizer, data.validation)
    results["sample"] = written._asdict() if written else None
    results["wall_seconds"] = round(time.perf_counter() - started, 1)
    if args.save_strategy != "no":
        save_whole_model(trainer)
    if trainer.is_world_process_zero():
        write(Path(args.output_dir), results)
        trainer.save_state()
    leave_together(trainer)


def say(text: str, args: Any) -> None:
    """Print what comes next, before it takes its time."""
    if args.process_index == 0:
        print(text, flush=True)


def announce(facts: dict[str, Any], args: Any) -> None:
    """Print what the run trains on, and how often it passes over the corpus."""
    if args.process_index == 0:
        epochs = f" ({facts['epochs']:.2f} epochs)" if "epochs" in facts else ""
        print(
            f"{facts['corpus']}: {args.max_steps} steps of {facts['tokens_per_step']:,} tokens = "
            f"{facts['tokens_asked']:,}{epochs}; {facts['validation_tokens']:,} held out"
        )


def build_model(shape: settings.ModelSettings, data: PretrainingData) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        **vars(shape),
        vocab_size=len(data.tokenizer),
        max_position_embeddings=max(1024, data.description["seq_len"]),
        bos_token_id=None,
        eos_token_id=data.tokenizer.eos_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def rates_of(model: LlamaForCausalLM, data: settings.DataSettings, args: Any) -> Rates:
    """Return what converts steps per second into tokens per second and utilization."""
    peak = data.peak_tflops or peak_tflops(args.device)
    return Rates(
        tokens_per_step=data.tokens_per_step,
        flops_per_token=flops_per_token(model, data.seq_len),
        peak_tflops=peak and peak * args.world_size,
    )


def save_whole_model(trainer: Trainer) -> None:
    """Write the model for ``from_pretrained``, even if checkpoints are sharded."""
    if trainer.is_fsdp_enabled:  # save_model writes nothing under SHARDED_STATE_DICT
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json`` and the figure, and say where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    name = f"{results['optim']}, {results['data']['corpus']}, lr {results['learning_rate']:g}"
    figure.loss_figure({results["optim"]: results}, folder / "loss.png", name)
    speed = results["tokens_per_second"]
    if results["sample"]:
        print(sampling.shown(sampling.Sample(**results["sample"])))
    print(
        f"{results['optim']}: validation loss {results['final_validation_loss']:.4f}"
        + (f", {speed:,.0f} tokens/s" if speed else "")
        + f"; {folder / 'results.json'}, {folder / 'loss.png'}"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except FloatingPointError as error:
        print(f"diverged: {error}", file=sys.stderr)
        sys.exit(DIVERGED)
