"""What share of a training step each optimizer takes, in one run on the pretraining recipe's model.

In: a configuration of ``recipes/llama_pretrain``, tokens per step. Out: a table (and JSON) of the
seconds of a step's forward and backward passes, of each optimizer's step on the resulting
gradients, and of its share of the sum. Optimizers take turns after every pass, each on its own copy
of the model, so that a busy machine slows all of them alike.

    python scripts/bench/share.py recipes/llama_pretrain/configs/5m.yaml --tokens 16384
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from turns import Step, summary, take_turns

import hf_muon

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "llama_pretrain"))

import settings

hf_muon.register()  # the configuration uses the name

LR, DECAY = 1e-3, 0.1
PASSES = "forward and backward"


@dataclass
class Row:
    """Seconds in each round, and the share of the whole step."""

    name: str
    seconds: list[float]
    shares: list[float]


def ours(model: nn.Module, **chosen: object) -> Step:
    """hf_muon, both halves."""
    return hf_muon.create_muon_optimizer(model, lr=LR, weight_decay=DECAY, **chosen).step


def torchs(model: nn.Module) -> Step:
    """torch.optim.Muon on the same matrices, and fused AdamW on the rest."""
    names = {one.name for one in hf_muon.route(model).muon}
    muon = [parameter for name, parameter in model.named_parameters() if name in names]
    others = [parameter for name, parameter in model.named_parameters() if name not in names]
    steps = (
        torch.optim.Muon(muon, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw").step,
        torch.optim.AdamW(others, lr=LR, weight_decay=DECAY, fused=True).step,
    )
    return lambda: [step() for step in steps]


def adamws(model: nn.Module) -> Step:
    """Fused AdamW on everything."""
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True).step


CONTENDERS = {
    "AdamW": adamws,
    "torch.optim.Muon": torchs,
    "hf_muon, defaults": ours,
    "hf_muon, four tight steps": lambda m: ours(m, polar_steps=4),
    "hf_muon, five steps of polar_express": lambda m: ours(m, coefficients="polar_express"),
}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], LlamaForCausalLM]:
    """Take turns: the passes, then every optimizer on their gradients."""
    shape, data, *_ = settings.parse([str(arguments.config), "--use_cpu", "true"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**vars(shape), vocab_size=data.vocab_size))
    batches = torch.randint(data.vocab_size, (arguments.tokens // data.seq_len, data.seq_len))
    copies = {name: copy.deepcopy(model) for name in CONTENDERS}
    steps = {name: make(copies[name]) for name, make in CONTENDERS.items()}

    def passes() -> None:
        model.zero_grad()
        for part in batches.split(arguments.batch):
            model(input_ids=part, labels=part).loss.backward()

    def hand_over(name: str) -> None:
        if name != PASSES:
            for own, given in zip(copies[name].parameters(), model.parameters(), strict=True):
                own.grad = given.grad.clone()

    passes()  # warmup, since optimizers may come first in a round
    rounds = take_turns({PASSES: passes, **steps}, arguments.repeats, "cpu", before=hand_over)
    rows = []
    for name in (PASSES, *steps):
        taken = [one[name] for one in rounds]
        shares = [one[name] / (one[PASSES] + one[name]) for one in rounds]
        rows.append(Row(name, taken, [1.0] * len(rounds) if name == PASSES else shares))
    return rows, model


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a pass")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all times")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, model = measure(arguments)
    table = Table(
        "", "ms", "range", "share of the step", "range",
        title=f"{arguments.config.name}, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{arguments.tokens:,} tokens, {arguments.threads} threads",
    )  # fmt: skip
    for row in rows:
        times = summary([1e3 * one for one in row.seconds], ",.0f")
        shares = ("", "") if row.name == PASSES else summary(row.shares, ".2%")
        table.add_row(row.name, *times, *shares)
    Console(width=110).print(table)
    if arguments.json:
        results = {"arguments": vars(arguments), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
