"""Reinforcement learning with TRL's ``GRPOTrainer`` and a rule as the reward: repeat the digit.

In: ``python grpo.py configs/grpo.yaml [--r 8] [--model smollm2] [--dataset owner/name] ...``; a
dataset has ``prompt`` and ``answer``. Out: see ``method.py``.
"""

from typing import Any

import datasets
from method import Method
from models import written
from trl import GRPOConfig, GRPOTrainer


def repeated(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return the share of each completion, ignoring spaces, that is its row's answer: 0 to 1."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    lengths = [max(1, len(text.replace(" ", ""))) for text in texts]
    return [
        text.count(word) * len(word) / length
        for text, word, length in zip(texts, answer, lengths, strict=True)
    ]


def digits(train: int, held_out: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return rows ``prompt, answer``. There are only ten, so the held-out rows are the same."""

    def rows(count: int) -> datasets.Dataset:
        answers = [str(number % 10) for number in range(count)]
        prompts = [f"Repeat the digit {answer}: {answer}{answer}{answer}" for answer in answers]
        return datasets.Dataset.from_dict({"prompt": prompts, "answer": answers})

    return rows(train), rows(held_out)


METHOD = Method(
    config=GRPOConfig,
    trainer=GRPOTrainer,
    packaged=digits,
    measures={"reward": "reward"},
    samples=lambda trainer, rows: written(trainer, rows, tokens=8),
    more=lambda model, adapted: {"reward_funcs": repeated},
)

if __name__ == "__main__":
    METHOD.run()
