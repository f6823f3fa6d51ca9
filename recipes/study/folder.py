"""A folder for the runs of one study, and a command line with options for every training.

In: a configuration, and the options after ``--``. Out: a folder that records both.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from shared.arguments import RecipeError


def split_extra(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line at ``--`` into our own arguments and those of every training."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def claim_folder(out: Path, config: Path, extra: Sequence[str]) -> None:
    """Record the configuration and options of the folder's runs; stop if it has other ones."""
    mark = out / "settings.txt"
    content = f"{config.read_text(encoding='utf8')}\n# {shlex.join(extra)}\n"
    if mark.is_file() and mark.read_text(encoding="utf8") != content:
        raise RecipeError(
            f"The runs in {out} had other settings ({mark}). Choose another --out, or delete it."
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(content, encoding="utf8")
