"""What a change of optimizer in mid-training does to the loss of the next steps.

In: seeds. Out: for each seed, the mean training loss of some steps after the change: with the
optimizer that had trained before, with the other one after ``hf-muon convert``, and with that one
and empty state for the matrices. A byte-level LLaMA of 0.4 million parameters in the stock Trainer,
at a constant rate, on the documentation of Python.

    python scripts/bench/switch.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[2] / "recipes"))  # for recipes/study

from study.byte_llama import LENGTH, sequences, texts

import hf_muon.auto  # noqa: F401 - registers the name
from hf_muon.commands.cli import app

AT, AFTER = 200, 60
"""The step of the change, and the steps that follow it."""
SPANS = ((0, 5), (5, 15), (15, 30), (30, AFTER))
WIDTH = 96
RATE, DECAY, ROWS, WARMUP = 3e-3, 0.1, 16, 20


class Switch:
    """The trainings of one seed, in one folder."""

    def __init__(self, folder: Path, seed: int, corpus: str = "stdlib") -> None:
        self.folder, self.seed = folder, seed
        text, _ = texts(corpus)
        starts = torch.arange(0, min(len(text), 600_000) - LENGTH - 1, LENGTH).numpy()
        self.data = [{"input_ids": r[:-1], "labels": r[:-1]} for r in sequences(text, starts)]

    def losses(self, name: str, optim: str, begin: Path | None = None) -> list[float]:
        """Return the loss of each step after the change; without a checkpoint also save one."""
        torch.manual_seed(self.seed)
        shape = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape, **heads))
        args = TrainingArguments(
            output_dir=str(self.folder / name),
            optim=optim,
            learning_rate=RATE,
            weight_decay=DECAY,
            max_steps=AT + AFTER,
            warmup_steps=WARMUP,
            lr_scheduler_type="constant_with_warmup",
            per_device_train_batch_size=ROWS,
            logging_steps=1,
            save_strategy="no" if begin else "steps",
            save_steps=AT,
            seed=self.seed,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=args, train_dataset=self.data)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(begin) if begin else None)
        return [e["loss"] for e in trainer.state.log_history if "loss" in e][AT:]

    def converted(self, checkpoint: Path, to: str) -> Path:
        """Return the folder that ``hf-muon convert`` writes."""
        target = self.folder / f"to-{to}"
        options = ["--to", to, "--out", str(target)]
        done = CliRunner().invoke(app, ["convert", str(checkpoint), *options])
        assert done.exit_code == 0, done.output
        return target

    def emptied(self, checkpoint: Path, matrices: set[str], names: list[str]) -> Path:
        """Return a copy in which the matrices have the state of a first step."""
        copy = Path(shutil.copytree(checkpoint, f"{checkpoint}-empty"))
        state = torch.load(copy / "optimizer.pt", weights_only=True)
        for index, name in enumerate(names):
            if name in matrices:
                for value in state["state"][index].values():
                    value.zero_()
        torch.save(state, copy / "optimizer.pt")
        return copy


def measured(folder: Path, seed: int) -> dict[str, list[float]]:
    """Return the losses after the change, by the optimizer that then trains."""
    switch, found = Switch(folder, seed), {}
    for old, new, label in (
        ("adamw_torch", "muon", "AdamW → Muon"),
        ("muon", "adamw_torch", "Muon → AdamW"),
    ):
        found[f"{label}: no change"] = switch.losses(old, old)
        target = switch.converted(folder / old / f"checkpoint-{AT}", new)
        found[f"{label}: converted"] = switch.losses(f"{new}-after", new, target)
        groups = torch.load(folder / "to-muon" / "optimizer.pt", weights_only=True)["param_groups"]
        matrices = {n for g in groups if g["algorithm"] == "muon" for n in g["param_names"]}
        names = [name for group in groups for name in group["param_names"]]
        if new != "muon":  # the Trainer's order: decayed parameters, then norms
            with torch.device("meta"):
                model = LlamaForCausalLM(LlamaConfig.from_pretrained(target))
            listed = [name for name, _ in model.named_parameters()]
            names = sorted(listed, key=lambda name: "norm" in name)
        empty = switch.emptied(target, matrices, names)
        found[f"{label}: empty state"] = switch.losses(f"{new}-empty", new, empty)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    seeds = parser.parse_args().seeds
    table = Table("after step 200", "seed", *(f"{a + 1} to {b}" for a, b in SPANS))
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            for label, losses in measured(Path(folder), seed).items():
                means = [sum(losses[a:b]) / (b - a) for a, b in SPANS]
                table.add_row(label, str(seed), *(f"{mean:.3f}" for mean in means))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
