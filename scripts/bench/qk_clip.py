"""QK-clip: what a sample costs, and what the next step's logits are.

In: sizes of a LLaMA. Out: the median time of sampled steps beside other steps of the same run, from
the beginning of a step to its end, and what a sample every ten steps adds to a run. With
``--bound``: a model of large logits learns a text by bytes at three learning rates, clipped in
every step; the largest logit of the next step, before its own clip, as a multiple of the threshold.
"""

import argparse
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import hf_muon.auto  # noqa: F401
from hf_muon import QKClip


class Clock(TrainerCallback):
    """Times the steps; runs after the clip at the beginning and at the end of a step."""

    def __init__(self, clip):
        self.clip, self.sampled, self.others = clip, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step > 4:  # the first steps take longer
            times = self.sampled if state.global_step % self.clip.every == 0 else self.others
            times.append(time.perf_counter() - self.begin)


def main():
    """Train, and print the times or the logits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=44)
    parser.add_argument("--threshold", type=float, default=1e-3, help="by default, all are clipped")
    parser.add_argument("--bound", action="store_true", help="the next logits instead of the times")
    given = parser.parse_args()
    (print_next_logits if given.bound else print_times)(given)


def print_times(given):
    """Print the times of sampled steps and of others."""
    clip = QKClip(given.threshold, every=2)
    clock = Clock(clip)
    rows = torch.randint(0, 1024, (64, given.tokens), generator=torch.Generator().manual_seed(0))
    train(given, llama(given), rows, 1e-3, clip, clock)
    sampled, other = statistics.median(clock.sampled), statistics.median(clock.others)
    print(f"steps without a sample {other * 1e3:.1f} ms, with one {sampled * 1e3:.1f} ms")
    print(f"a sample costs {100 * (sampled / other - 1):.1f} % of a step, every=10 adds ", end="")
    print(f"{10 * (sampled / other - 1):.2f} %")


def print_next_logits(given):
    """Print the largest logits of steps that follow a clip, as multiples of the threshold."""
    text = Path(find_spec("pydoc_data.topics").origin).read_bytes()
    rows = torch.tensor(list(text[: len(text) // given.tokens * given.tokens]))
    print("| learning rate | median | nine in ten below | largest | last without the clip |")
    print("|---|---|---|---|---|")
    for rate in (1e-3, 4e-3, 1.6e-2):
        found = []
        for threshold in (given.threshold, 1e9):
            model = llama(given, enlarged=10.0)
            history = train(
                given, model, rows.view(-1, given.tokens), rate, QKClip(threshold, every=1)
            )
            logits = [entry.get("max_attention_logit") for entry in history]
            found.append(torch.tensor([x for x in logits if x is not None]) / given.threshold)
        clipped, free = found[0][1:], found[1]  # no clip precedes the first step
        median, most = clipped.quantile(torch.tensor([0.5, 0.9])).tolist()
        print(f"| {rate} | {median:.2f} | {most:.2f} | {clipped.max():.2f} | {free[-1]:.1f} |")


def llama(given, enlarged=1.0):
    """Return a LLaMA with random weights, those of queries and keys enlarged."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=given.hidden,
            intermediate_size=given.hidden * 8 // 3,
            num_hidden_layers=given.layers,
            num_attention_heads=given.heads,
            max_position_embeddings=given.tokens,
        )
    )
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data.mul_(enlarged)
    return model


def train(given, model, rows, rate, *callbacks):
    """Train at a constant rate; return what was logged."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            optim="muon",
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            logging_steps=10**6,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
