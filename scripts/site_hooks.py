"""Hooks of the documentation site (mkdocs.yml).

In: the pages in docs/, the README of each recipe and of the examples, and two pages at the root of
the repository. Out: the pages of one site. Links between them work as they do in the repository;
links to other files become links into the repository if pyproject.toml names one, and plain names
otherwise. In docstrings, roles become links, and examples become code.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
REPOSITORY = URLS.get("Repository", "").rstrip("/")

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|mod|attr):<code>(~?)([\w.]+)</code>")


def pages() -> dict[str, str]:
    """Return the place on the site of each Markdown file of the repository."""
    found = {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}
    for path in (ROOT / "recipes").glob("*/README.md"):
        found[f"recipes/{path.parent.name}/README.md"] = f"recipes/{path.parent.name}.md"
    return found | {
        "README.md": "index.md",
        "examples/README.md": "examples.md",
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link to the repository that pyproject.toml names, if it names one."""
    if REPOSITORY:
        config.repo_url = REPOSITORY
        config.repo_name = REPOSITORY.rpartition("/")[2]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, target in pages().items():
        if not source.startswith("docs/") and files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, content=_content(ROOT / source)))
    return files


def _content(path: Path) -> str:
    """Return the text of a page; that of the examples shows their code."""
    scripts = sorted(path.parent.glob("*.py")) if path.parent.name == "examples" else []
    code = [f"\n## {script.stem}\n\n```python\n{script.read_text()}```\n" for script in scripts]
    return "".join([path.read_text(), *code])


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files into links between pages of the site."""
    sources = {target: source for source, target in pages().items() if source != "README.md"}
    source = sources.get(page.file.src_uri)
    if source is None:  # a page of another site, as in the tests
        return markdown
    parts, end = [], 0
    for block in FENCE.finditer(markdown):
        parts += [_relinked(markdown[end : block.start()], source), block[0]]
        end = block.end()
    return "".join([*parts, _relinked(markdown[end:], source)])


def _relinked(text: str, source: str) -> str:
    """Return the text of a file with its links turned into links of its page."""
    known = pages()
    here = posixpath.dirname(known[source])

    def other(link: re.Match[str]) -> str:
        said, target, anchor = link[1], link[2], link[3] or ""
        if re.match(r"\w+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = known.get(path) or known.get(f"{path}/README.md")
        if page is not None:
            return f"[{said}]({posixpath.relpath(page, here or '.')}{anchor})"
        if path.startswith("docs/"):  # an image
            return f"[{said}]({posixpath.relpath(path.removeprefix('docs/'), here or '.')})"
        if REPOSITORY:
            return f"[{said}]({REPOSITORY}/blob/main/{path})"
        return said if path.endswith(said.strip("`")) else f"{said} (`{path}`)"

    return LINK.sub(other, text)


class Examples(griffe.Extension):
    """Shows examples in docstrings as code, as griffe does in a section named Examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)


def on_page_content(html: str, **_: Any) -> str:
    """Turn roles in docstrings into links; clean up ``::`` marks, and escaped bars in tables."""
    names = re.findall(r'id="(hf_muon\.[\w.]+)"', html)
    anchors = {name.rpartition(".")[2]: name for name in names}

    def link(role: re.Match[str]) -> str:
        last = role[2].rpartition(".")[2]
        shown = f"<code>{last if role[1] else role[2]}</code>"
        return f'<a href="#{anchors[last]}">{shown}</a>' if last in anchors else shown

    html = CELL.sub(lambda cell: cell[0].replace(r"\|", "|"), html)
    return ROLE.sub(link, html).replace("::</p>", ":</p>")
