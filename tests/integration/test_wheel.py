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
import tomllib
import venv
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from tests.distributed.launch import ROOT
from tests.integration import markdown
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


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


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


@pytest.fixture(scope="module")
def metadata(built):
    """The wheel's metadata, checked as an index checks it."""
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    return Metadata.from_email(archive.read(path), validate=True)


def test_the_metadata_says_what_pyproject_says(built, metadata):
    own = project()["project"]
    assert metadata.license_expression == "Apache-2.0"
    assert str(metadata.requires_python) == ">=3.11"
    assert {"deepspeed", "peft", "recipes", "notebook", "docs", "dev"} == set(
        metadata.provides_extra
    )
    assert str(metadata.version) == own["version"]
    assert {path.name for path in built.iterdir()} == {
        f"hf_muon-{own['version']}.tar.gz",
        f"hf_muon-{own['version']}-py3-none-any.whl",
    }


def test_an_index_shows_the_readme_without_links_that_lead_nowhere(metadata, tmp_path):
    assert metadata.description_content_type == "text/markdown"
    shown, readme = tmp_path / "shown.md", ROOT / "README.md"
    shown.write_text(metadata.description)
    relative = [link for link in markdown.links(readme) if "://" not in link]
    absolute = [link for link in markdown.links(readme) if "://" in link]
    assert relative  # else the hook has nothing to do
    assert markdown.links(shown) == absolute
    assert markdown.FENCE.findall(shown.read_text()) == markdown.FENCE.findall(readme.read_text())


def kept(folder):
    """The sources in a folder; what a run or a build left there is ignored by git."""
    written = {"runs", "__pycache__", "out"}
    kinds = {".py", ".md", ".sh", ".yaml", ".json", ".ipynb"}
    for path in folder.rglob("*"):
        if path.suffix in kinds and not written & set(path.relative_to(ROOT).parts):
            yield path


def test_the_sdist_holds_what_builds_and_tests_it(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    held = names(sdist)
    listed = project()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    for path in ["pyproject.toml", *listed]:
        wanted = kept(ROOT / path) if (ROOT / path).is_dir() else [ROOT / path]
        missing = {file.relative_to(ROOT).as_posix() for file in wanted} - held
        assert not missing, path
    top = {name.split("/")[0] for name in held} - {"", "PKG-INFO", ".gitignore"}
    assert top == {"pyproject.toml", *listed}
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
