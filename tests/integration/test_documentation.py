"""Every Python block of the documentation runs, and every link leads somewhere.

The blocks of a page run in order in one process, as a reader would type them. Before them stand the
names that a page takes for granted; dots, as in ``Trainer(..., callbacks=…)``, become these names.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from urllib.parse import urlparse

import pytest

from tests.distributed.launch import ON_CPU, ROOT, free_port
from tests.integration import markdown

PRELUDE = """
import torch
from tests.integration.tiny import tiny_data, tiny_llama

torch.manual_seed(0)
model, data = tiny_llama(), tiny_data(16)
batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
matrices = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
the_rest = [p for name, p in model.named_parameters() if not ("layers" in name and p.ndim == 2)]
"""
DOTS = ("Trainer(..., ", "Trainer(model=model, args=args, train_dataset=data, ")
# What a page needs besides, what is made smaller in it, and what must be there afterwards.
MORE = {
    "docs/polar.md": "x = torch.randn(4, 6)\n",
    "docs/robust.md": """
import hf_muon.auto
from transformers import Trainer
from tests.integration.tiny import arguments as tiny_arguments
args = tiny_arguments("out")
""",
    "docs/preference_tuning.md": """
from datasets import Dataset
from tests.integration.tiny_text import word_tokenizer, sentences

tokenizer = word_tokenizer()
tokenizer.eos_token = "[SEP]"
tokenizer.save_pretrained("causal")
tiny_llama(vocab_size=len(tokenizer)).save_pretrained("causal")
name = "causal"
texts = [text for _, text in sentences(8)]
preferences = Dataset.from_dict({"prompt": texts, "chosen": texts[::-1], "rejected": texts})
""",
    "docs/orders.md": "gradients = [torch.randn(4, 6) for _ in range(21)]\n",
    "docs/routing.md": "import hf_muon\n",
    "docs/diagnostics.md": """
import hf_muon.auto
from transformers import Trainer
from hf_muon.diagnostics import replay
from tests.integration.tiny import arguments as tiny_arguments
args = tiny_arguments("out")
gradients = [torch.randn(4, 6) for _ in range(5)]
""",
}
MORE["docs/step.md"] = MORE["docs/robust.md"]
MORE["docs/trainers.md"] = """
from datasets import Dataset
from transformers import (
    BertForMaskedLM, BertForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration,
)
from hf_muon import Muon
from tests.integration.tiny_text import pairs as rows, saved_bert, sentences, word_tokenizer

made, make = [], Muon.__init__


def made_too(self, *args, **kwargs):
    make(self, *args, **kwargs)
    made.append(self)


Muon.__init__ = made_too
tokenizer = word_tokenizer()
tokenizer.eos_token = "[SEP]"
tokenizer.save_pretrained("causal")
tiny_llama(vocab_size=len(tokenizer)).save_pretrained("causal")
small = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
config = T5Config(vocab_size=128, decoder_start_token_id=0, **small)
T5ForConditionalGeneration(config).save_pretrained("t5")
saved_bert("encoder", BertModel)
saved_bert("masked", BertForMaskedLM)
saved_bert("ranker", BertForSequenceClassification, num_labels=1)
texts = [text for _, text in sentences(8)]
conversations = Dataset.from_dict({"prompt": texts, "completion": texts[::-1]})
preferences = Dataset.from_dict({"prompt": texts, "chosen": texts[::-1], "rejected": texts})
prompts = Dataset.from_dict({"prompt": texts})
scored = Dataset.from_dict(rows(8))
pairs = scored.remove_columns("label")
labeled = Dataset.from_dict({"text": texts, "label": [0, 1] * 4})
"""
SMALLER = {
    "docs/preference_tuning.md": [('Config("out",', 'Config("out", use_cpu=True,')],
    "docs/trainers.md": [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "causal"),
        ('Config("out",', 'Config("out", use_cpu=True,'),
        ("google-t5/t5-small", "t5"),
        ("sentence-transformers/all-MiniLM-L6-v2", "encoder"),
        ("naver/splade-v3", "masked"),
        ("cross-encoder/ms-marco-MiniLM-L6-v2", "ranker"),
        ("max_steps=20", "max_steps=2"),
    ],
    "docs/diagnostics.md": [
        ("batches(200)", "batches(5)"),
        ("batches(128)", "batches(8)"),
        (
            "Trainer(..., callbacks",
            "Trainer(model=tiny_llama(), args=args, train_dataset=data, callbacks",
        ),
        (
            '"runs/watched"]',
            '"runs/watched", *"--corpus stdlib --max_documents 30 --vocab_size 400 '
            "--tokens_per_step 512 --per_device_train_batch_size 4 --max_steps 4 --hidden_size 32 "
            '--intermediate_size 64".split()]',
        ),
        ("every=10", "every=2"),
    ],
}
REPORT = "import pathlib\nreport = pathlib.Path('out/muon_report.json').read_text()\n"
AFTERWARDS = {
    "README.md": "assert type(optimizer).__name__ == 'Muon'",
    "docs/checkpoints.md": "import pathlib\nassert pathlib.Path('out/checkpoint-4').is_dir()",
    "docs/deepspeed.md": "assert engine.zero_optimization_stage() == 2",
    "docs/extending.md": "assert optimizer.param_groups[0]['filter'] == 'two_terms'",
    "docs/filters.md": "assert set(map(tuple, optimizer.momenta().values())) == {(0.95,)}",
    "docs/diagnostics.md": "import os\nassert os.path.isfile('runs/watched/spectra.jsonl')",
    "docs/finetune_lora.md": REPORT + "assert 'tangent' in report",
    "docs/get_started.md": REPORT + "assert 'lm_head' in report",
    "docs/learning_rates.md": "assert taken_over",
    "docs/qk_clip.md": "assert 'max_attention_logit' in str(trainer.state.log_history)",
    "docs/orders.md": "assert len(ahead) == 16 and max(map(abs, ahead)) <= 1",
    "docs/preference_tuning.md": REPORT + "assert 'tangent' in report",
    "docs/polar.md": "assert (factor @ factor.T - torch.eye(4)).norm() < 0.1",
    "docs/robust.md": "assert RobustAggregation('median').settings.method == 'median'",
    "docs/routing.md": "assert plan.muon",
    "docs/settings.md": "assert optimizer.param_groups[0]['order'] == 'post_polar'",
    "docs/step.md": "assert type(optimizer).__name__ == 'Muon'",
    "docs/trainers.md": "assert len(made) == 14\nassert all(one.state for one in made)",
    "docs/troubleshooting.md": "assert issubclass(KeepSchedule, TrainerCallback)",
}
SLOW = {
    "docs/deepspeed.md",
    "docs/diagnostics.md",
    "docs/preference_tuning.md",
    "docs/trainers.md",
}
# These pages share a process, since most of the time goes into imports.
TOGETHER = (
    "README.md", "docs/get_started.md", "docs/settings.md", "docs/step.md", "docs/finetune_lora.md",
    "docs/learning_rates.md", "docs/routing.md", "docs/qk_clip.md", "docs/filters.md",
    "docs/orders.md", "docs/checkpoints.md",
)  # fmt: skip
NEEDS = {
    "docs/preference_tuning.md": ("trl",),
    "docs/trainers.md": ("trl", "sentence_transformers", "setfit", "lightning"),
}


def name(page):
    return page.relative_to(ROOT).as_posix()


def python_blocks(page):
    return [block for block in markdown.blocks(page) if block.language == "python"]


PAGES = [
    pytest.param(page, id=name(page), marks=[pytest.mark.full] if name(page) in SLOW else [])
    for page in markdown.PAGES
    if python_blocks(page) and name(page) not in TOGETHER
]


def script(page):
    """The page's blocks as one program."""
    code = "\n".join(block.code for block in python_blocks(page))
    for old, new in [*SMALLER.get(name(page), []), DOTS]:
        assert old in code or old == DOTS[0], f"{name(page)} no longer says {old!r}"
        code = code.replace(old, new)
    return "\n".join([PRELUDE, MORE.get(name(page), ""), code, AFTERWARDS[name(page)]])


def run(code, folder):
    """Run a program in a folder in which the repository's folders can be seen."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "program.py").write_text(code)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(free_port())
    environment = os.environ | ON_CPU | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["HF_MUON_CACHE"] = str(folder / "cache")
    environment |= alone if "deepspeed" in code else {}
    return subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tmp_path):
    for package in NEEDS.get(name(page), ()):
        if find_spec(package) is None:
            pytest.skip(f"pip install {package}")
    done = run(script(page), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_blocks_of_other_pages_run(tmp_path):
    done = run("\n".join(script(ROOT / page) for page in TOGETHER), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_block_that_is_wrong_is_noticed(tmp_path):
    done = run(PRELUDE + "create_muon_optimizer(model, lr=1e-3)\n", tmp_path)
    assert "NameError" in done.stderr


@pytest.mark.parametrize("page", markdown.PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for link in markdown.links(page):
        if urlparse(link).scheme:
            continue  # other sites are not visited
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = target.exists() and ROOT in [target, *target.parents]
        if not known or (anchor and anchor not in markdown.anchors(target)):
            broken.append(link)
    assert broken == []


def test_a_broken_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`: three\n\n[a](#one-two-three) [b](no.md) `[c](code.md)`\n")
    assert markdown.links(page) == ["#one-two-three", "no.md"]
    assert markdown.anchors(page) == {"one-two-three"}
