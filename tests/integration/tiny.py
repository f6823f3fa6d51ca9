"""A LLaMA of some thousand parameters, data for it, and a stock Trainer around both."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY, LENGTH = 128, 16


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_llama(seed=0, **overrides):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **overrides}))


def tiny_data(count=64):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, kind=TrainingArguments, **overrides):
    settings = {
        "output_dir": str(folder),
        "optim": "muon",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(**{**settings, **overrides})


def trainer_of(folder, model=None, data=None, trainer_settings=None, **overrides):
    return Trainer(
        model=tiny_llama() if model is None else model,
        args=arguments(folder, **overrides),
        train_dataset=tiny_data() if data is None else data,
        **(trainer_settings or {}),
    )


def trained(folder, *args, **kwargs):
    trainer = trainer_of(folder, *args, **kwargs)
    trainer.train()
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
