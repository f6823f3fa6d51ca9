"""A sample of text from a pretrained model, shown at the end of a run.

In: a ``Trainer`` after training, its tokenizer, and held-out blocks. Out: the beginning of a
held-out text and the model's continuation; None if a process does not hold the whole weights.
"""

from __future__ import annotations

from typing import NamedTuple

import datasets
import torch
from transformers import PreTrainedTokenizerBase, Trainer

PROMPT, WRITTEN = 24, 60


class Sample(NamedTuple):
    """Held-out text, and its continuation by the model."""

    prompt: str
    written: str


def sample(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, held_out: datasets.Dataset
) -> Sample | None:
    """Continue the first held-out text, at temperature 0.8 among the 40 likeliest tokens.

    Sampling has a fixed seed, and the state of the global random generators does not change. Under
    FSDP and DeepSpeed a process holds only part of the weights; then the result is None.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokens = held_out[0]["input_ids"]
    prompt = torch.as_tensor(tokens)[None, : min(PROMPT, len(tokens) // 2)].to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        found = model.eval().generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=WRITTEN,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    count = prompt.shape[1]
    return Sample(*(tokenizer.decode(part) for part in (prompt[0], found[0, count:])))


def shown(found: Sample, who: str = "The model") -> str:
    """Return the sample as indented lines with a heading."""
    text = f"{found.prompt}┃{found.written}"
    lines = [f"    {line}" for line in text.strip().splitlines()]
    return "\n".join([f"{who} goes on with a held-out text (from ┃ on it is the model's):", *lines])
