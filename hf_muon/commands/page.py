"""Parts of a self-contained HTML page: text, tables, folded tables, figures.

In: text, rows, figures as SVG. Out: HTML. Text that is not HTML yet is escaped here; colors follow
the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --ink: #222; --muted: #6b6b6b; --line: #e2e2e2;
  --back: #fff; --raised: #f6f7f8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e4e4; --muted: #9c9c9c; --line: #3a3a3a; --back: #16181b; --raised: #1f2226; }}
}}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto;
  padding: 1rem 1rem 3rem; color: var(--ink); background: var(--back); overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; margin: .8rem 0; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
.facts {{ display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; margin: 0;
  padding: .9rem 1rem; background: var(--raised); border-radius: .5rem; }}
.facts dt {{ color: var(--muted); }} .facts dd {{ margin: 0; }}
.wide {{ overflow-x: auto; overflow-wrap: normal; }}
table {{ border-collapse: collapse; font-size: 13px; }}
td, th {{ padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; }} td {{ font-variant-numeric: tabular-nums; }}
td:not(:last-child) {{ white-space: nowrap; }} td:last-child {{ min-width: 8rem; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 1rem; }}
figure {{ margin: 0; max-width: 40rem; }} figure.large {{ max-width: none; }}
figure svg {{ width: 100%; height: auto; }}
figure.large svg {{ min-width: 40rem; }}
figcaption, .note {{ color: var(--muted); font-size: 13px; }}
details {{ border-bottom: 1px solid var(--line); padding: .3rem 0; }}
summary {{ cursor: pointer; }} summary span {{ color: var(--muted); }}
details .wide {{ padding: .3rem 0 .5rem 1rem; }}
.missing {{ color: var(--muted); }}
@media (max-width: 34rem) {{ .facts {{ grid-template-columns: 1fr; gap: 0; }}
  .facts dd {{ margin-bottom: .5rem; }} }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page."""
    return _PAGE.format(title=escape(title), body="\n".join(part for part in parts if part))


def section(title: str, content: str, missing: str = "") -> str:
    """Return a heading with its content, or with the reason why it is missing.

    Without either, return an empty string.
    """
    if not content and not missing:
        return ""
    return f"<h2>{escape(title)}</h2>\n" + (content or f'<p class="missing">{escape(missing)}</p>')


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and values as a list."""
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows]
    inside = "\n".join(lines)
    return f'<dl class="facts">\n{inside}\n</dl>' if lines else ""


def text(sentences: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(sentences)}</p>"


def note(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table that scrolls sideways if it is wide; an empty string if it has no rows."""
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<tr>{heads}</tr>\n{body}\n</table></div>'


def folded(title: str, summary: str, content: str, *, is_open: bool = False) -> str:
    """Return content that a click on its title shows or hides."""
    state = " open" if is_open else ""
    head = f"<summary>{escape(title)} <span>{escape(summary)}</span></summary>"
    return f"<details{state}>{head}\n{content}\n</details>"


def figures(drawn: Iterable[tuple[str, str]], *, large: bool = False) -> str:
    """Return figures with captions, side by side if there is room."""
    of = ' class="large"' if large else ""
    inside = "\n".join(
        f'<figure{of}><div class="wide">{svg}</div>{_caption(caption)}</figure>'
        for svg, caption in drawn
        if svg
    )
    return f'<div class="figures">\n{inside}\n</div>' if inside and not large else inside


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""
