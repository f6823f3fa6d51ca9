"""A LLaMA of 0.4 M parameters over bytes, and text for it that needs no download.

In: the number of a step, the rank and the number of ranks. Out: the rank's rows of that step's
batch, which is the same on any number of ranks; the loss on held-out text; and a sample of the
model's output.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, BATCH = 128, 16  # bytes in a row, rows in a step of all processes together
TRAINED_ON, HELD_OUT = "[a-m]*.py", "[n-z]*.py"


def build_model() -> LlamaForCausalLM:
    """Return the model, with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


@cache
def text(files: str) -> torch.Tensor:
    """Return some of Python's own sources as bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    content = b"\n".join(path.read_bytes() for path in sorted(library.glob(files)))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def rows(step: int, rank: int = 0, ranks: int = 1, files: str = TRAINED_ON) -> torch.Tensor:
    """Return a rank's rows (rows, LENGTH) of the batch that belongs to a step's number."""
    generator, content = torch.Generator().manual_seed(step), text(files)
    starts = torch.randint(len(content) - LENGTH, (BATCH,), generator=generator)
    if BATCH % ranks:
        raise SystemExit(f"{BATCH} rows do not divide among {ranks} processes.")
    own = starts.chunk(ranks)[rank]
    return torch.stack([content[start : start + LENGTH] for start in own.tolist()]).long()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM) -> float:
    """Return the loss, in nats per byte, on four batches of held-out files."""
    device = next(model.parameters()).device
    batches = [rows(step, files=HELD_OUT).to(device) for step in range(4)]
    return sum(model(input_ids=batch, labels=batch).loss.item() for batch in batches) / 4


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompt: str = "    def __init__(self") -> str:
    """Return a prompt and the 48 bytes that the model writes after it."""
    ids = torch.tensor([list(prompt.encode())], device=next(model.parameters()).device)
    told = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=0)
    return bytes(told[0].tolist()).decode(errors="replace")
