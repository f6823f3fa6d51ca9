"""Whether a command that the documentation shows would be understood.

In: a line of a shell block and the folder in which it is typed. Out: what is wrong with it: a file
that does not exist, an option that the program does not have. Nothing is executed.
"""

import ast
import re
import shlex
from dataclasses import fields
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import click
import trl
import typer
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import TrainingArguments

from hf_muon.commands.cli import app
from tests.distributed.launch import ROOT

USERS_OWN = {"train.py", "script.py"}  # a script of the reader
ELSEWHERE = {"axolotl", "llamafactory"}  # packages that do not fit beside the tested versions
LANGUAGES = ("", "bash", "sh")


def commands(code):
    """The commands of a block as words: continued lines joined, comments and prompts left out.

    A line that is no command (a diagram, the output of one) gives none.
    """
    for line in code.replace("\\\n", " ").splitlines():
        line = re.split(r"\s[;|]\s|&&", line.removeprefix("$ "))[0]
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a quotation mark in prose
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and (Path(words[0]).name in KNOWN or words[0].endswith(".sh")):
            yield words


def problems(words, folder):
    """What is wrong with a command typed in a folder."""
    if words[0].endswith(".sh"):
        return missing(words[0], folder)
    return KNOWN[Path(words[0]).name](words[1:], folder)


def missing(file, folder):
    """Say that a file is neither in the folder nor at the root of the repository."""
    if file in USERS_OWN or (folder / file).is_file() or (ROOT / file).is_file():
        return []
    return [f"no file {file}"]


def unknown(words, options, program):
    """Say which options a program does not have."""
    given = [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    return [f"{program} has no {option}" for option in given if option not in options]


def python(words, folder):
    if words[0] == "-m":
        return module(words[1:], folder)
    found = missing(words[0], folder)
    if found or words[0] in USERS_OWN:
        return found
    path = next(path for path in (folder / words[0], ROOT / words[0]) if path.is_file())
    return unknown(words[1:], script_options(path), words[0]) + configs(words[1:], path.parent)


def module(words, folder):
    name, *rest = words
    if name == "hf_muon.run":
        return python(rest, folder)
    if name == "pip" or name.split(".")[0] in ELSEWHERE:
        return []
    found = find_spec(name)
    if found is None:
        return [f"no module {name}"]
    return unknown(rest, literals(Path(found.origin)), name)


def configs(words, folder):
    """Say which configurations of a recipe do not exist."""
    given = [word for word in words if re.fullmatch(r"[\w/]+\.ya?ml", word)]
    return [f"no file {name}" for name in given if not (folder / name).is_file()]


def script_options(path):
    """The options of a script: what it adds itself, and the fields of what it parses into."""
    options = literals(path)
    rates = ROOT / "recipes" / "shared" / "rates.py"  # --other_learning_rate of two recipes
    rates = rates if path.parent.name in ("llama_pretrain", "lora_finetune") else path
    for settings in (path.with_name("settings.py"), path.with_name("method.py"), rates, path):
        if settings.is_file():
            names = {
                target.target.id
                for kind in ast.walk(ast.parse(settings.read_text()))
                if isinstance(kind, ast.ClassDef)
                for target in kind.body
                if isinstance(target, ast.AnnAssign)
            }
            options |= {f"--{name}" for name in names}
    if "from study import command" in path.read_text():  # the command line of every study
        options |= literals(ROOT / "recipes" / "study" / "command.py")
    trainers = (
        "run.py",
        "compare.py",
        "search.py",
        "heat_map.py",
        "layerwise.py",
        "run_clm.py",
        "dry_run.py",
    )
    if path.name in trainers:  # they hand what they do not know on, or are one themselves
        options |= {f"--{item.name}" for item in fields(TrainingArguments)} | {"--"}
    if path.parent.name == "post_training":
        method = "Reward" if path.stem == "reward" else path.stem.upper()
        stock = fields(getattr(trl, f"{method}Config"))
        options |= {f"--{item.name}" for item in stock}
    if path.name == "plan.py":  # hands its options on to `hf-muon plan`
        options |= options_of(subcommand("plan"))
    return options


def literals(path):
    """The options that a file spells out, also with underscores in place of its hyphens."""
    found = set(re.findall(r"[\"'](--?[A-Za-z][\w-]*)[\"']", path.read_text()))
    return found | {f"--{name[2:].replace('-', '_')}" for name in found if name.startswith("--")}


def launcher(options, flags=()):
    """Check a launcher's options, then the script it starts."""

    def check(words, folder):
        own, rest = [], list(words)
        while rest and rest[0].startswith("-") and rest[0] != "-m":
            own.append(rest.pop(0))
            if own[-1] not in flags and "=" not in own[-1]:
                rest.pop(0)
        found = unknown(own, options, "the launcher")
        return found + (python(rest, folder) if rest else [])

    return check


def accelerate(words, folder):
    parser = launch_command_parser()
    options = {name for action in parser._actions for name in action.option_strings}
    files = [after for word, after in pairwise(words) if word == "--config_file"]
    checked = [file for file in files if file != "…"]
    found = [problem for file in checked for problem in missing(file, folder)]
    return found + launcher(options)(words[1:], folder)


def torchrun(words, folder):
    parser = get_args_parser()
    return launcher({name for action in parser._actions for name in action.option_strings})(
        words, folder
    )


def deepspeed(words, folder):
    runner = Path(find_spec("deepspeed").origin).parent / "launcher" / "runner.py"
    return launcher(literals(runner))(words, folder)


def hf_muon(words, folder):
    command = subcommand(words[0])
    if command is None:
        return [f"hf-muon has no {words[0]}"]
    return unknown(words[1:], options_of(command), f"hf-muon {words[0]}")


def subcommand(name):
    group = typer.main.get_command(app)
    return group.get_command(click.Context(group), name)


def options_of(command):
    return {name for item in command.params for name in item.opts}


def sbatch(words, folder):
    return missing(words[0], folder)


def pip(words, folder):
    """Check that the extras of the package exist."""
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    asked = re.findall(r"(?:\.|hf-muon)\[([\w,]+)\]", " ".join(words))
    names = [name for group in asked for name in group.split(",")]
    return [f"no extra {name}" for name in names if f"\n{name} = " not in extras]


KNOWN = {
    "python": python,
    "python3": python,
    "accelerate": accelerate,
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "hf-muon": hf_muon,
    "sbatch": sbatch,
    "pip": pip,
}
