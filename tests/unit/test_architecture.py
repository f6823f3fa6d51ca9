"""Imports point one way: the entry points know the rooms, the rooms do not know each other."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_muon

ROOT = Path(hf_muon.__file__).parent

# room -> the rooms of the package that it may import, besides itself.
ALLOWED = {
    "values": set(),
    "shown": set(),
    "stages": {"polar"},
    "rules": {"stages"},
    "checks": {"polar", "rules", "values"},
    "config": {"checks", "rules", "stages", "values"},
    "polar": set(),
    "distributed": {"polar"},
    "optimizer": {"config", "distributed", "polar", "rules", "stages", "values"},
    "routing": {"config", "distributed", "rules", "shown", "values"},
    "diagnostics": {
        "config",
        "distributed",
        "optimizer",
        "polar",
        "routing",
        "rules",
        "stages",
        "values",
    },
    "integrations": {"config", "optimizer", "polar", "routing", "rules", "shown", "values"},
    "commands": {
        "config",
        "diagnostics",
        "distributed",
        "optimizer",
        "polar",
        "routing",
        "rules",
        "shown",
        "stages",
        "values",
    },
    "run": {"integrations", "optimizer"},
    "auto": {"integrations"},
}
# Entry points inside a room, and the rooms that they know in addition.
ENTRY_POINTS = {
    "diagnostics/monitor.py": {"integrations"},
    "integrations/robust.py": {"distributed"},
}
# Files that work elementwise or on whole matrices, and know nothing of processes or trainers.
PURE = [
    "polar",
    "stages.py",
    "rules.py",
    "optimizer/momentum.py",
    "optimizer/scaling.py",
    "optimizer/auto_momentum.py",
    "optimizer/prefilters.py",
    "optimizer/rescales.py",
    "optimizer/maps.py",
    "optimizer/writes.py",
    "optimizer/int8.py",
    "diagnostics/metrics.py",
    "diagnostics/synthetic.py",
    "diagnostics/noise_edge.py",
    "diagnostics/spectra.py",
    "diagnostics/advice.py",
    "diagnostics/instability.py",
]


def python_files(path):
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def imported_modules(path, everywhere=True):
    """Absolute names of all modules that a file imports, in functions too if ``everywhere``."""
    return {name.rpartition(":")[0] or name for name in imported(path, everywhere)}


def imported(path, everywhere=True):
    """The same, and ``module:name`` for what is imported from a module."""
    package = ["hf_muon", *path.relative_to(ROOT).with_suffix("").parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names |= {f"{module}:{alias.name}" for alias in node.names}
    return names


def import_graph():
    """The modules of the package, each with those that it imports anywhere, types included."""
    files = {
        ".".join(["hf_muon", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for path in python_files(ROOT)
    }
    graph = {}
    for module, path in files.items():
        names = (name.partition(":") for name in imported(path))
        found = {f"{base}.{name}" if f"{base}.{name}" in files else base for base, _, name in names}
        graph[module] = (found & set(files)) - {module}
    return graph


def room_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "hf_muon" and len(parts) > 1 else None


def rooms():
    return {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}


def test_every_room_has_a_rule():
    assert rooms() - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_downwards(room):
    path = ROOT / room if (ROOT / room).is_dir() else ROOT / f"{room}.py"
    for file in python_files(path):
        imported = {room_of(name) for name in imported_modules(file)} - {None, room}
        more = ENTRY_POINTS.get(file.relative_to(ROOT).as_posix(), set())
        assert imported <= ALLOWED[room] | more, file


@pytest.mark.parametrize("path", PURE)
def test_pure_rooms_know_no_processes_and_no_trainers(path):
    for file in python_files(ROOT / path):
        for name in imported_modules(file):
            assert not name.startswith(("torch.distributed", "transformers", "accelerate")), file


@pytest.mark.parametrize("room", ["polar", "optimizer", "distributed", "config", "routing"])
def test_torch_is_all_that_these_rooms_need_to_be_imported(room):
    path = ROOT / room if (ROOT / room).is_dir() else ROOT / f"{room}.py"
    for file in python_files(path):
        for name in imported_modules(file, everywhere=False):
            assert name.split(".")[0] not in {"transformers", "accelerate", "peft", "deepspeed"}


def test_importing_the_package_does_not_import_transformers_or_triton():
    code = "import sys, hf_muon; sys.exit(bool({'transformers', 'triton'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = code.replace("; sys", "; hf_muon.SpectralMonitor; sys")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 1


def test_no_modules_import_each_other():
    graph = import_graph()
    assert {"hf_muon.config", "hf_muon.routing.route"} <= graph["hf_muon.routing.plan"]
    list(TopologicalSorter(graph).static_order())  # raises with the circle
    with pytest.raises(CycleError):
        list(TopologicalSorter({**graph, "hf_muon.values": ["hf_muon.config"]}).static_order())


def test_the_check_sees_imports():
    names = imported_modules(ROOT / "integrations" / "factory.py")
    assert {"hf_muon.routing", "torch"} <= names


def test_no_file_is_over_400_lines():
    for file in python_files(ROOT):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file
