"""Supervised fine-tuning with TRL's ``SFTTrainer``: tweets in the requested mood.

In: ``python sft.py configs/sft.yaml [--r 8] [--model smollm2] [--dataset owner/name] ...``; a
dataset has prompts and completions, conversations, or plain text. Out: see ``method.py``.
"""

from method import Method
from models import written
from moods import completions
from trl import SFTConfig, SFTTrainer

METHOD = Method(
    config=SFTConfig,
    trainer=SFTTrainer,
    packaged=completions,
    measures={"loss": "loss", "token_accuracy": "mean_token_accuracy"},
    samples=written,
)

if __name__ == "__main__":
    METHOD.run()
