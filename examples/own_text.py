"""Pretrain a byte-level LLaMA on a text file, then let it write.

python examples/own_text.py README.md
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

LENGTH = 64
text = Path(sys.argv[1]).read_bytes()
rows = torch.tensor(list(text)).split(LENGTH)[:-1]  # the last may be shorter
data = [{"input_ids": row, "labels": row} for row in rows]
sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads))

args = TrainingArguments(
    output_dir="out/own_text",
    optim="muon",
    learning_rate=5e-3,
    weight_decay=0.1,
    warmup_steps=5,
    max_steps=60,
    logging_steps=10,
    save_strategy="no",
)
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()

prompt = torch.tensor([list(b"The ")], device=model.device)
written = model.generate(prompt, max_new_tokens=60, do_sample=True, pad_token_id=0)
print(bytes(written[0].tolist()).decode(errors="replace"))
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
