"""The README for a package index (hatchling's metadata hook, see pyproject.toml).

In: README.md, which links to files beside it. Out: the same page without pictures, and with those
files named instead of linked, because an index shows only this page. Once the repository has a
public address, add it to ``[project.urls]`` and make the links absolute here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:)([^)#\s]*)(?:#[^)\s]*)?\)")
NOTE = "\nPaths are those of the source distribution.\n"


def named(link: re.Match[str]) -> str:
    """Return the text that replaces a relative link."""
    picture, text, path = link.groups()
    if picture:
        return ""
    return text if not path or path == text.strip("`") else f"{text} (`{path}`)"


def long_description(readme: str) -> str:
    """Return the README without relative links; code blocks do not change."""
    parts = FENCE.split(readme)
    parts[::2] = [RELATIVE.sub(named, part) for part in parts[::2]]
    return "".join(parts) + NOTE


class LongDescription(MetadataHookInterface):
    """Adds the field ``readme`` to the metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the field from the README in the folder being built."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(text)}
