"""The documentation site builds without a warning, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlparse

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


class Page(HTMLParser):
    """What a page of HTML links to, the anchors it has, and the words it shows outside code."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.shown, self.silent = [], set(), [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.silent += tag in ("code", "pre", "script", "style")
        self.anchors.add(values.get("id"))
        self.links += [values[key] for key in ("href", "src") if values.get(key)]

    def handle_endtag(self, tag):
        self.silent -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self.silent:
            self.shown.append(data)


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def broken(pages, site):
    """Links and anchors of the site's own that lead nowhere."""
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the root of a server
            continue
        for link in page.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = target.is_file() and site in target.parents
            if not known or (anchor and target in pages and anchor not in pages[target].anchors):
                yield path.relative_to(site), link


def test_every_link_of_the_site_leads_somewhere(pages, site):
    assert list(broken(pages, site)) == []
    assert sum(len(page.links) for page in pages.values()) > 2000
    assert (site / "recipes" / "llama_pretrain" / "index.html") in pages


def test_a_broken_link_is_noticed(tmp_path):
    html = '<h1 id="a">A</h1> <a href="#a">1</a> <a href="#b">2</a> <img src="no.png">'
    (tmp_path / "index.html").write_text(html)
    pages = {tmp_path / "index.html": Page(tmp_path / "index.html")}
    assert [link for _, link in broken(pages, tmp_path)] == ["#b", "no.png"]


def test_no_markup_is_shown_raw(pages, site):
    raw = re.compile(r"~hf_muon\.|:(?:func|class|meth|mod|attr):|\]\(|\*\*|^\|.*\|$|^#+ |``")
    found = {
        (path.relative_to(site), text.strip())
        for path, page in pages.items()
        for text in page.shown
        if raw.search(text.strip())
    }
    assert found == set()


def test_no_page_loads_anything_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not re.findall(r'(?:<script|<img)[^>]* src="https?:[^"]*"', path.read_text()), path


def entries(navigation):
    """The pages of a navigation, whatever they are nested in."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in entries(part)]


def test_every_page_is_in_the_navigation():
    navigation = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    recipes = {path.parent.name for path in (ROOT / "recipes").glob("*/README.md")}
    more = {f"recipes/{name}.md" for name in recipes}
    more |= {"examples.md", "changelog.md", "contributing.md"}
    assert sorted(navigation) == sorted(pages | more)
    index = (ROOT / "docs" / "index.md").read_text()
    assert all(f"]({page}" in index for page in pages - {"index.md"})
    assert all(f"](../recipes/{name}/README.md)" in index for name in recipes)


def test_a_link_to_nothing_stops_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# A page\n\n[Nothing](nothing.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: test\ndocs_dir: docs\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode != 0
