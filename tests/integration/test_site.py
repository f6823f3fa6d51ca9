"""The documentation site builds without a warning, and its reference has every public name."""

import os
import re
import subprocess
import sys

import pytest
import yaml

import hf_muon
from tests.distributed.launch import ROOT


def build(config, folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--config-file", str(config)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def test_the_reference_has_every_public_name(site):
    page = (site / "api" / "index.html").read_text()
    shown = set(re.findall(r'id="hf_muon\.(?:[\w.]*\.)?(\w+)"', page))
    assert shown >= {*hf_muon.__all__, *hf_muon.diagnostics.__all__, "import_state"}


def test_signatures_and_errors_are_shown_and_roles_are_not(site):
    page = (site / "api" / "index.html").read_text()
    assert "newton_schulz" in page
    assert page.count("Raises:") >= 10
    assert ":func:" not in page


def test_every_page_is_in_the_navigation():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    navigation = re.search(r"^nav:\n((?:  - .*\n)+)", (ROOT / "mkdocs.yml").read_text(), re.M)[1]
    assert set(yaml.safe_load(navigation)) == pages
    assert all(page in (ROOT / "docs" / "index.md").read_text() for page in pages - {"index.md"})


def test_a_link_to_nothing_stops_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# A page\n\n[Nothing](nothing.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: test\ndocs_dir: docs\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode != 0
