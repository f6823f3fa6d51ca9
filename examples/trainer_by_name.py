"""Muon in the stock Trainer, by name: a small LLaMA learns to count.

python examples/trainer_by_name.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
)
counts = [(torch.arange(16) + start) % 64 for start in range(64)]
data = [{"input_ids": row, "labels": row} for row in counts]

args = TrainingArguments(
    output_dir="out/trainer_by_name",  # muon_report.json there says what trains each parameter
    optim="muon",
    optim_args="momentum=0.95,nesterov=true",  # any field of hf_muon.MuonConfig
    learning_rate=1e-2,  # Muon's and AdamW's: updates have AdamW's size by default
    weight_decay=0.1,
    max_steps=30,
    logging_steps=5,
    save_strategy="no",
)
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
