"""What a step of Muon would cost each rank for a model of this recipe, without training it.

In: ``python plan.py configs/7b.yaml --ranks 64 --layout fsdp2``, with the options of
``hf-muon plan``. Out: its table. Nothing is downloaded, and one process is enough.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared

from settings import HERE, SETTINGS, ModelSettings
from shared.arguments import RecipeError, read
from transformers import LlamaConfig

from hf_muon.commands.cli import app


def main(argv: Sequence[str]) -> None:
    """Print the plan of ``config.yaml`` under the options that follow it."""
    if not argv or argv[0].startswith("-"):
        raise RecipeError("Say which model: python plan.py configs/7b.yaml --ranks 64")
    values = read(argv[:1], SETTINGS, HERE).values
    shape = {item.name: values[item.name] for item in fields(ModelSettings)}
    config = LlamaConfig(**shape, vocab_size=values["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        app(["plan", folder, *argv[1:]])  # ends the process, as on a command line


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        sys.exit(f"error: {error}")
