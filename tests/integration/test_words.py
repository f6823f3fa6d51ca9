"""README is short, its figures are those of the pages behind it, and sentences are plain."""

import dataclasses
import re

import pytest

from hf_muon import MuonConfig
from tests.distributed.launch import ROOT
from tests.integration import markdown

README = (ROOT / "README.md").read_text()
# Sentences that readers had to read twice, as they stood in these pages.
BEFORE = [
    "with a reason for every parameter",
    "Muon needs of AdamW's tokens",
    "less state",
    "tight steps of ours",
    "was misled",
    "are a start",
    "What it learns from the Trainer",
    "on the way together",
    "routed otherwise",
    "It trains, but",
    "how fast to go",
    "stopping and going on",
]
FIGURE = re.compile(r"[+−-]?\d+\.\d+ ± \d+\.\d+|\d+(?:\.\d+)? ± \d+(?:\.\d+)? %|\d+\.\d+")


def words(text):
    """Everything between spaces, the bars of tables left out."""
    return [word for word in text.split() if word.strip("|-")]


def results(text):
    """The part of README that holds the results."""
    return re.search(r"<!-- results -->\n(.*?)<!-- /results -->", text, re.DOTALL)[1]


def unknown_figures(section):
    """Figures of the section's table that the page it links to first does not have."""
    target = re.search(r"\]\(((?:docs|recipes)/[\w/]+\.md)", section)[1]
    page = (ROOT / target).read_text()
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [figure for row in rows for figure in FIGURE.findall(row) if figure not in page]


def test_readme_is_short():
    assert len(words(README)) <= 1000


def test_the_first_lines_of_readme_say_what_it_is_and_what_has_run_it():
    first = README[:1000]
    assert 'optim="muon"' in first
    assert "**Status**" in first
    assert "GPU" in first


def test_every_figure_of_the_results_is_on_the_page_behind_them():
    assert len([row for row in results(README).splitlines() if FIGURE.search(row)]) > 3
    assert unknown_figures(results(README)) == []


def test_a_figure_that_differs_is_noticed():
    section = results(README)
    figure = FIGURE.findall("\n".join(row for row in section.splitlines() if row[:1] == "|"))[0]
    assert unknown_figures(section.replace(figure, "9.999 ± 0.999")) == ["9.999 ± 0.999"]


@pytest.mark.parametrize("page", markdown.PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_sentence_that_had_to_be_read_twice(page):
    text = " ".join(page.read_text().split())
    assert [sentence for sentence in BEFORE if sentence in text] == []


def test_the_page_of_settings_has_every_field():
    page = (ROOT / "docs" / "settings.md").read_text()
    fields = dataclasses.fields(MuonConfig)
    assert [field.name for field in fields if f"`{field.name}`" not in page] == []
