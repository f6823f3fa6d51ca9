"""Run an unmodified script with ``optim="muon"`` registered.

``python -m hf_muon.run script.py …`` or ``python -m hf_muon.run -m package.module …``; also behind
``accelerate launch -m`` and ``torchrun -m``. In: the command line of the script. Out: its exit, and
a line if the script was told to use Muon and did not.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from torch.distributed import get_node_local_rank
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_muon.integrations.names import NAMES
from hf_muon.integrations.transformers import register
from hf_muon.optimizer import Muon

USAGE = "usage: python -m hf_muon.run [-m] SCRIPT_OR_MODULE [ARGUMENTS …]"


def main(arguments: list[str]) -> None:
    """Register the names, then run the script or module as ``__main__`` with its arguments."""
    as_module = arguments[:1] == ["-m"]
    target, *rest = arguments[as_module:] or [""]
    if not target or target in ("-h", "--help"):
        print(f"{USAGE}\n\nRegisters optim='muon' for the Hugging Face Trainer, then runs.")
        raise SystemExit(0 if target else 2)
    if not as_module and not Path(target).is_file():
        raise SystemExit(f"hf_muon.run: no script {target!r}; a module needs -m.\n{USAGE}")
    if as_module and not _module_exists(target):
        raise SystemExit(f"hf_muon.run: no module {target!r}.\n{USAGE}")
    register()
    sys.argv = [target, *rest]
    stepped: set[type] = set()
    # It stays: torch iterates over these hooks, so that none may remove itself.
    register_optimizer_step_pre_hook(lambda optimizer, *_: stepped.add(type(optimizer)))
    try:
        if as_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(target).resolve().parent)
            runpy.run_path(target, run_name="__main__")
    except SystemExit as end:  # sys.exit(main()) of a script that ended well
        if not end.code:
            _say_if_ignored(rest, stepped)
        raise
    _say_if_ignored(rest, stepped)


def _say_if_ignored(arguments: list[str], stepped: set[type]) -> None:
    """Print a line, on the first rank of each machine, if Muon was asked for and took no step."""
    is_first = get_node_local_rank(fallback_rank=0) == 0
    if is_first and _asked(arguments) and not any(issubclass(one, Muon) for one in stepped):
        print(
            "hf_muon.run: the arguments ask for Muon, and Muon trained nothing. A script that sets "
            'TrainingArguments in its code ignores them: set optim="muon" there.',
            file=sys.stderr,
        )


def _asked(arguments: list[str]) -> bool:
    """Return whether ``--optim`` names one of the family."""
    given = [value for name, value in pairwise(arguments) if name == "--optim"]
    given += [one.partition("=")[2] for one in arguments if one.startswith("--optim=")]
    return any(value in NAMES for value in given)


def _module_exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package does not exist
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
