"""Run an unmodified script with ``optim="muon"`` registered.

``python -m hf_muon.run script.py …`` or ``python -m hf_muon.run -m package.module …``; also behind
``accelerate launch -m`` and ``torchrun -m``. In: the command line of the script. Out: its exit, and
a line if the script was told to use Muon and did not.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

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
    trained: list[bool] = []

    def notice(optimizer: object, *_: object) -> None:
        if isinstance(optimizer, Muon) and not trained:
            trained.append(True)
            hook.remove()

    hook = register_optimizer_step_pre_hook(notice)
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(target).resolve().parent)
        runpy.run_path(target, run_name="__main__")
    if not trained and _asked(rest):
        print(
            "hf_muon.run: the arguments ask for Muon, and Muon trained nothing. A script that sets "
            'TrainingArguments in its code ignores them: set optim="muon" there.',
            file=sys.stderr,
        )


def _asked(arguments: list[str]) -> bool:
    """Return whether ``--optim`` names one of the family."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [value for name, value in pairs if name == "--optim"]
    given += [one.partition("=")[2] for one in arguments if one.startswith("--optim=")]
    return any(value in NAMES for value in given)


def _module_exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package does not exist
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
