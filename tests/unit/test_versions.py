"""The versions that are named are those that are tested."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import hf_muon

ROOT = Path(hf_muon.__file__).parents[1]


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_versions_that_are_named_are_installed():
    assert sys.version_info[:2] >= (3, 11)
    for named in constraints():
        found = installed(named.name)
        # A build for one machine carries a local label, as 2.13.0+cpu does.
        assert found is None or Version(found).public in named.specifier, (named, found)
    assert installed("torch") is not None


def test_the_lower_bounds_admit_what_is_named():
    project = (ROOT / "pyproject.toml").read_text()
    bounds = re.findall(r'"([\w-]+>=[\d.]+)"', project)
    named = {item.name.lower(): item for item in constraints()}
    assert bounds
    for bound in map(Requirement, bounds):
        if bound.name.lower() in named:
            (exact,) = named[bound.name.lower()].specifier
            assert exact.version in bound.specifier, (bound, exact)


def test_the_lowest_python_is_the_same_everywhere():
    lowest = re.search(r'^requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[
        1
    ]
    named = {"README.md": f"Python ≥ {lowest}."}
    named |= {
        f"scripts/{name}.sh": f">= {lowest})" for name in ("quickstart", "test", "docs", "notebook")
    }
    named["scripts/setup.sh"] = f"({lowest.replace('.', ', ')})"
    named["constraints.txt"] = f"(Python {lowest})"  # their numpy needs it
    for file, words in named.items():
        assert words in (ROOT / file).read_text(), file


def test_one_version_of_the_package_is_named_everywhere():
    own = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == own == version("hf-muon")
    assert f"\n## {own}\n" in (ROOT / "CHANGELOG.md").read_text()
