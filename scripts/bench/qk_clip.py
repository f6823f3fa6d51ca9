"""The cost of QK-clip: sampled steps beside other steps of the same run.

In: sizes of a LLaMA with random weights. Out: the median time of both kinds of steps, from the
beginning of a step to its end, and what a sample every ten steps adds to a run.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

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
    """Train, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=44)
    parser.add_argument("--threshold", type=float, default=1e-3, help="every head is clipped")
    given = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=given.hidden,
        intermediate_size=given.hidden * 8 // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        max_position_embeddings=given.tokens,
    )
    rows = torch.randint(0, 1024, (64, given.tokens))
    clip = QKClip(given.threshold, every=2)
    clock = Clock(clip)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            optim="muon",
            learning_rate=1e-3,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            logging_steps=10**6,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        model = LlamaForCausalLM(config)
        Trainer(model=model, args=args, train_dataset=data, callbacks=[clip, clock]).train()
    sampled, other = statistics.median(clock.sampled), statistics.median(clock.others)
    print(f"steps without a sample {other * 1e3:.1f} ms, with one {sampled * 1e3:.1f} ms")
    print(f"a sample costs {100 * (sampled / other - 1):.1f} % of a step, every=10 adds ", end="")
    print(f"{10 * (sampled / other - 1):.2f} %")


if __name__ == "__main__":
    main()
