"""nanoGPT's benchmark for CPUs, characters of Shakespeare: AdamW as published, tuned, and Muon.

In: ``python compare.py run --out FILE.jsonl [--corpus file:input.txt] [--arms ARM ...]``. Out: the
file, one line per training; with ``report``, a table and a figure of it. It may be stopped at any
time, and the same command continues it.

The benchmark's text is tiny Shakespeare: 1,115,394 characters, public domain,
https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for recipes/shared and recipes/study

import text
from arms import ARMS, BUDGET, REFERENCE
from shared.arguments import RecipeError
from shared.progress import quiet_libraries
from study import command
from study.harness import Train
from training import BLOCK, train

STEPS, PUBLISHED_LOSS = 2000, 1.88
QUICK = {"steps": 8, "held_out": 16}
QUICK_TEXT, QUICK_BUDGET = 200 * BLOCK, 2


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, or print what was found."""
    arguments = parsed(argv)

    def prepare() -> tuple[list[dict[str, Any]], Train]:
        quiet_libraries()
        corpus = text.load(arguments.corpus, QUICK_TEXT if arguments.quick else None)
        sizes = QUICK if arguments.quick else {"steps": arguments.steps}
        return [{"text": corpus.name, **sizes}], partial(train, corpus)

    command.execute(arguments, ARMS, REFERENCE, prepare, target=PUBLISHED_LOSS)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser, running, _ = command.parsers(__doc__, list(ARMS), BUDGET)
    running.add_argument(
        "--corpus",
        default="shakespeare",
        help="file:PATH of the benchmark's text, or a corpus of the pretraining recipe",
    )
    running.add_argument("--steps", type=int, default=STEPS, help="of every training")
    running.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args(argv)
    if getattr(arguments, "quick", False):
        arguments.budget = min(arguments.budget, QUICK_BUDGET)
    return arguments


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"error: {error}")
