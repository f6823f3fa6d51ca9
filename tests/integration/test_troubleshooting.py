"""The messages in docs/troubleshooting.md are those of the code, and every guard has its line."""

import ast
import re

import pytest
from transformers import TrainingArguments

from tests.distributed.launch import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "\0"  # what a message fills in; no quotation reaches across it
SOURCES = ("hf_muon", "recipes/shared", "recipes/llama_pretrain")
# Rooms whose errors a user of the optimizer can meet; those of diagnostics and of the command line
# are about the arguments of the very call that raises them.
GUARDED = ("optimizer", "distributed", "integrations", "routing")
FOREIGN = "is not a valid OptimizerNames"  # of transformers


def text(node):
    """The fixed parts of a string or an f-string, or nothing."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) or GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{text(node.left)}{GAP}{text(node.right)}"
    return ""


def strings(tree):
    return [found for node in ast.walk(tree) if (found := text(node))]


def files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def quoted():
    """The parts of the messages in the first column of the tables."""
    rows = re.findall(r"^\| (`.*?) \| ", PAGE.read_text(), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    return [part.strip() for message in messages for part in message.split("…") if part.strip()]


def test_every_quoted_message_is_in_the_code(quoted):
    known = [found for path in files(*SOURCES) for found in strings(ast.parse(path.read_text()))]
    missing = [part for part in quoted if not any(part in found for found in known)]
    assert missing == [FOREIGN]
    assert len(quoted) > 40


def test_the_foreign_message_is_the_one_of_an_unknown_optimizer(tmp_path):
    with pytest.raises(ValueError, match=FOREIGN):
        TrainingArguments(output_dir=str(tmp_path), optim="nomuon")


def raised(path):
    """The messages that a file raises, with the lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if getattr(node.exc.func, "id", "") == "AssertionError":  # cannot happen
                continue
            if found := [text(argument) for argument in node.exc.args if text(argument)]:
                yield node.lineno, found[0]


def test_every_guard_is_on_the_page(quoted):
    folders = [f"hf_muon/{room}" for room in GUARDED]
    unknown = [
        f"{path.relative_to(ROOT)}:{line}: {message.replace(GAP, '…')}"
        for path in files(*folders)
        for line, message in raised(path)
        if not any(part in message for part in quoted)
    ]
    assert not unknown, "\n".join(unknown)
