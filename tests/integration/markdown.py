"""What is in the Markdown files: blocks of code, links, and the anchors of headings.

In: the repository's pages. Out: plain data for the tests of the documentation.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launch import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "recipes/**/*.md")
    for path in ROOT.glob(pattern)
    if "runs" not in path.parts
)


@dataclass(frozen=True)
class Block:
    """A block of code, where it stands, and its language, which may be empty."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in FENCE.finditer(text)
    ]


def links(page):
    """Targets of links, those in code left out."""
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text()))
    return LINK.findall(text)


def anchors(page):
    """The anchors that a page offers, as hosts of repositories and mkdocs make them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {slug(heading) for heading in headings}


def slug(heading):
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
