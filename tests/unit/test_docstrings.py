"""Every public name says what it is, and the public functions what goes in and comes out."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import hf_muon

ROOT = Path(hf_muon.__file__).parent
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
OFFERED = [
    *(f"hf_muon.{name}" for name in hf_muon.__all__ if name != "diagnostics"),
    *(f"hf_muon.diagnostics.{name}" for name in hf_muon.diagnostics.__all__),
    "hf_muon.optimizer.import_state",
]


def public(node, prefix):
    """The public definitions below a node, with their dotted names."""
    for child in node.body:
        if isinstance(child, DEFINITIONS) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, name)


def overloaded(node):
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(name in ("overload", "typing.overload", "override") for name in decorators)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    silent = [
        name
        for name, node in public(tree, path.stem)
        if not ast.get_docstring(node) and not overloaded(node)
    ]
    assert silent == []


def found(name):
    module, _, attribute = name.rpartition(".")
    return getattr(inspect.importlib.import_module(module), attribute)


def parameters(thing):
    """What a caller passes; fields of a dataclass that is only returned are described elsewhere."""
    if inspect.isclass(thing) and thing.__init__ is object.__init__:
        return []
    names = [
        name
        for name, parameter in inspect.signature(thing).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return names


@pytest.mark.parametrize("name", OFFERED)
def test_what_is_offered_explains_every_argument(name):
    thing = found(name)
    text = inspect.getdoc(thing)
    missing = [word for word in parameters(thing) if not re.search(rf"\b{word}\b", text)]
    assert missing == []


@pytest.mark.parametrize("name", OFFERED)
def test_functions_say_what_they_return_and_raise(name):
    thing = found(name)
    if inspect.isclass(thing):
        return
    text = inspect.getdoc(thing)
    if inspect.signature(thing).return_annotation not in (None, "None"):
        assert re.search(r"^(Returns|Yields):", text, re.MULTILINE) or text.startswith(
            ("The ", "A ", "Return", "Whether ")
        )
    tree = ast.parse(inspect.getsource(thing))
    if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree)):
        assert "Raises:" in text


def test_the_check_can_fail():
    tree = ast.parse("class A:\n    '''A.'''\n    def b(self): ...\n")
    silent = [name for name, node in public(tree, "m") if not ast.get_docstring(node)]
    assert silent == ["m.A.b"]
    assert dataclasses.is_dataclass(hf_muon.MuonConfig)
