"""Fine-tune LoRA adapters with Muon.

python examples/lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_muon.auto  # noqa: F401  (makes optim="muon" a valid name)

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
# Yours: base = AutoModelForCausalLM.from_pretrained(...)
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
counts = [(torch.arange(16) + start) % 64 for start in range(64)]
data = [{"input_ids": row, "labels": row} for row in counts]

args = TrainingArguments(
    output_dir="out/lora",
    optim="muon",
    optim_args="lora_update=tangent",  # update A and B together, as the product BA
    learning_rate=3e-2,  # for this toy; start from 4e-3
    max_steps=30,
    logging_steps=5,
    save_strategy="no",
)
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
model.save_pretrained("out/lora/adapter")

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
