"""One line when training begins: what Muon trains, what AdamW, and where the details are.

In: a :class:`~hf_muon.Muon`, and the path of its report if one was written. Out: the line, shown
whenever the Trainer shows its own warnings and losses; ``log_level="error"`` hides it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from transformers.utils import logging as of_transformers

from hf_muon.optimizer import Muon
from hf_muon.shown import count

logger = logging.getLogger(__name__)


def say(text: str) -> None:
    """Show a line as information, not as a warning.

    If INFO messages are logged, it is one of them. By default they are not; then the line goes
    directly to standard error, like the Trainer's progress bar.
    """
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(text)
    elif of_transformers.get_verbosity() <= logging.WARNING:
        print(f"hf_muon: {text}", file=sys.stderr, flush=True)


def first_line(optimizer: Muon, report: Path | None) -> str:
    """Return ``Muon trains 14 matrices (106 k parameters), AdamW 7 tensors (33 k); details in …``.

    Args:
        optimizer: The optimizer before its first step. Sizes come from its routes, which have the
            whole shapes under any sharding. For groups that were made by hand, the line has no
            sizes.
        report: The path of its report; None leaves out where the details are.
    """
    routes = optimizer.routes
    if routes:
        total = routes["totals"]
        matrices, others = total["muon_matrices"], total["adamw_tensors"]
        of_muon = f" ({count(total['muon_parameters'])} parameters)"
        of_adamw = f" ({count(total['adamw_parameters'])})"
    else:
        groups, of_muon, of_adamw = optimizer.param_groups, "", ""
        matrices = sum(len(inside) for g in groups for inside in g.get("matrices", ()))
        others = sum(len(g["params"]) for g in groups if g["algorithm"] == "adamw")
    text = _of("Muon trains", matrices, "matrix", "matrices") + of_muon
    text += f", {_of('AdamW', others, 'tensor', 'tensors')}{of_adamw}" if others else ""
    return f"{text}; details in {report}" if report else text


def _of(who: str, number: int, one: str, several: str) -> str:
    return f"{who} {number:,} {one if number == 1 else several}"
