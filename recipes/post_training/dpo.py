"""Preference tuning with TRL's ``DPOTrainer``: a good mood is preferred to a bad one.

In: ``python dpo.py configs/dpo.yaml [--r 8] [--model smollm2] [--dataset owner/name] ...``; a
dataset has ``prompt``, ``chosen`` and ``rejected``. Out: see ``method.py``.
"""

from copy import deepcopy

from method import Method
from models import written
from moods import preferences
from trl import DPOConfig, DPOTrainer

METHOD = Method(
    config=DPOConfig,
    trainer=DPOTrainer,
    packaged=preferences,
    # Before training the policy equals the reference: the loss is log 2, and no pair has a margin.
    measures={"loss": "loss", "preferred": "rewards/accuracies"},
    samples=written,
    # With adapters, the reference is the model without them.
    more=lambda model, adapted: {"ref_model": None if adapted else deepcopy(model)},
)

if __name__ == "__main__":
    METHOD.run()
