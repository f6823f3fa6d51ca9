"""Every command that the documentation shows names files and options that exist."""

import pytest

from tests.distributed.launch import ROOT
from tests.integration import markdown, shell

BLOCKS = [
    block
    for page in markdown.PAGES
    for block in markdown.blocks(page)
    if block.language in shell.LANGUAGES
]


def typed(block):
    """The commands of a block with the folder they are typed in: of a recipe's page, its own."""
    folder = block.page.parent
    for line in block.code.splitlines():
        if line.startswith("cd "):
            folder = ROOT / line.split()[1]
    return [(words, folder) for words in shell.commands(block.code)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_its_commands_can_be_typed(block):
    found = [problem for words, folder in typed(block) for problem in shell.problems(words, folder)]
    assert found == []


def test_commands_are_found():
    count = sum(len(typed(block)) for block in BLOCKS)
    assert count > 40


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("python run.py configs/nine.yaml", "no file configs/nine.yaml"),
        ("python run.py configs/tiny.yaml --lerning_rate 1", "run.py has no --lerning_rate"),
        ("accelerate launch --confg_file a.yaml run.py", "the launcher has no --confg_file"),
        ("torchrun --nproc_per_node 2 gone.py", "no file gone.py"),
        ("python -m no_such_module --x", "no module no_such_module"),
        ("hf-muon root model", "hf-muon has no root"),
        ("hf-muon plan model --rangs 4", "hf-muon plan has no --rangs"),
        ("scripts/gone.sh", "no file scripts/gone.sh"),
        ("pip install -e '.[recipe]'", "no extra recipe"),
    ],
)
def test_a_command_that_is_wrong_is_noticed(line, problem):
    (words,) = shell.commands(line)
    assert shell.problems(words, ROOT / "recipes" / "llama_pretrain") == [problem]
