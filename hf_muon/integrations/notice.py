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
        muon = _of("Muon trains", total["muon_matrices"], "matrix", "matrices")
        muon += f" ({count(total['muon_parameters'])} parameters)"
        adamw = _of("AdamW", total["adamw_tensors"], "tensor", "tensors")
        adamw += f" ({count(total['adamw_parameters'])})"
        others = total["adamw_tensors"]
    else:
        groups = optimizer.param_groups
        matrices = [len(inside) for g in groups for inside in g.get("matrices", ())]
        others = sum(len(g["params"]) for g in groups if g["algorithm"] == "adamw")
        muon = _of("Muon trains", sum(matrices), "matrix", "matrices")
        adamw = _of("AdamW", others, "tensor", "tensors")
    text = f"{muon}, {adamw}" if others else muon
    return f"{text}; details in {report}" if report else text


def _of(who: str, number: int, one: str, several: str) -> str:
    return f"{who} {number:,} {one if number == 1 else several}"
