"""Hooks of the documentation site (mkdocs.yml).

In: pages of docs/. Out: the same pages, without what a site cannot show: files of the repository
outside docs/ are named instead of linked, and Sphinx roles lose their prefix.
"""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):(?=<code>)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name the files outside docs/ that a page links to."""
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2]}`)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Remove the prefixes of Sphinx roles."""
    return ROLE.sub("", html)
