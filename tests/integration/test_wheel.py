"""What is built and installed works by itself, away from the repository.

The wheel goes into an environment of its own, without its dependencies: those are seen through a
path to the ones that are installed here, so that nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from itertools import chain
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT
from tests.integration.test_recipe_llama import SMALL
from tests.integration.tiny import tiny_llama

SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, HfArgumentParser, LlamaForCausalLM, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
model = LlamaForCausalLM(AutoConfig.from_pretrained("model"))
rows = torch.randint(0, model.config.vocab_size, (16, 12))
data = [{"input_ids": row, "labels": row} for row in rows]
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
optimizer = trainer.optimizer.optimizer
Path("seen.json").write_text(json.dumps({
    "losses": losses, "optimizer": type(optimizer).__name__,
    "file": sys.modules["hf_muon"].__file__,
}))
"""


def run(*command, folder, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def build(source, folder, *targets):
    wanted = [word for target in targets for word in ("-t", target)]
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, *wanted, folder=source)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder, "sdist", "wheel")
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder of an environment that has the wheel, and elsewhere what it needs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (wheel,) = built.glob("*.whl")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, folder=folder)
    # Files ending in .pth there are not read, so the package of the repository stays out of sight.
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "elsewhere.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def names(archive):
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    return {"/".join(Path(name).parts[1:]) for name in tarfile.open(archive).getnames()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    held = names(wheel)
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_muon").rglob("*.py")}
    assert {name for name in held if name.endswith(".py")} == tracked
    assert "hf_muon/py.typed" in held
    rest = {name.split("/")[0] for name in held} - {"hf_muon"}
    assert all(name.endswith(".dist-info") for name in rest)
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_metadata_says_what_pyproject_says(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    fields = Parser().parsestr(archive.read(path).decode())
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    assert {"deepspeed", "peft", "recipes", "notebook", "docs", "dev"} == set(
        fields.get_all("Provides-Extra")
    )
    assert "optim=" in fields.get_payload()  # README


def test_the_sdist_holds_what_builds_and_tests_it(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    held = names(sdist)
    for needed in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "mkdocs.yml"):
        assert needed in held
    for folder in ("hf_muon", "recipes", "tests", "scripts", "docs"):
        assert any(name.startswith(f"{folder}/") for name in held)
    assert not [name for name in held if ".venv" in name or "__pycache__" in name]
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "again", "wheel")
    (first,), (second,) = built.glob("*.whl"), (tmp_path / "again").glob("*.whl")
    assert names(first) == names(second)


def test_the_command_routes_a_model(installed, tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    shown = run(installed / "bin" / "hf-muon", "route", tmp_path, folder=tmp_path)
    assert "q_proj" in shown
    assert "embed_tokens" in shown


def test_an_unmodified_script_trains_with_muon(installed, tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    options = ["--output_dir", "out", "--optim", "muon", "--learning_rate", "0.02"]
    options += ["--max_steps", "12", "--logging_steps", "1", "--report_to", "none"]
    options += ["--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]
    python = installed / "bin" / "python"
    run(python, "-m", "hf_muon.run", "script.py", *options, folder=tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["optimizer"] == "Muon"
    assert Path(seen["file"]).is_relative_to(installed)
    assert seen["losses"][-1] < seen["losses"][0]
    assert (tmp_path / "out" / "muon_report.json").is_file()


@pytest.mark.full
def test_the_quickstart_runs_from_what_is_published(built, installed, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    recipe = source / "recipes" / "llama_pretrain"
    (source / "hf_muon").rename(tmp_path / "away")  # the wheel's is used
    small = {**SMALL, "max_steps": 3}
    words = chain.from_iterable((f"--{name}", str(value)) for name, value in small.items())
    cache = {"HF_MUON_CACHE": str(tmp_path / "cache")}
    python = installed / "bin" / "python"
    run(python, "compare.py", "configs/tiny.yaml", "--", *words, folder=recipe, **cache)
    results = sorted(recipe.rglob("results.json"))
    assert len(results) == 2
    optimizers = {json.loads(path.read_text())["optim"] for path in results}
    assert optimizers == {"muon", "adamw_torch_fused"}
