"""The figure of a study: loss over learning rate, and loss over rank.

In: the content of ``study.json``. Out: a PNG.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def study_figure(report: dict[str, Any], path: Path) -> None:
    """Draw nothing yet."""
