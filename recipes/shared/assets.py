"""Where models and texts lie that ``scripts/prepare_assets.py`` installs.

In: the name of a package, or of something in the cache. Out: a folder. The packages carry files
only: they are found by path and never imported.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from shared.arguments import RecipeError


def cache_folder() -> Path:
    """Return the folder for tokenizers and assets: ``HF_MUON_CACHE`` or ``~/.cache/hf_muon``."""
    return Path(os.environ.get("HF_MUON_CACHE", Path.home() / ".cache" / "hf_muon"))


def package_folder(package: str, asset: str) -> Path:
    """Return the folder of an installed package.

    Raises:
        RecipeError: it is not installed; the message names the command that installs ``asset``.
    """
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise missing(asset)
    return Path(folders[0])


def cached_folder(asset: str) -> Path:
    """Return the folder of an asset in the cache.

    Raises:
        RecipeError: it is not there; the message names the command that makes it.
    """
    folder = cache_folder() / "assets" / asset
    if not folder.is_dir():
        raise missing(asset)
    return folder


def missing(asset: str) -> RecipeError:
    """Return the error that says how to install an asset."""
    return RecipeError(
        f"{asset!r} is not installed. Install it with "
        f"`python scripts/prepare_assets.py --only {asset}`."
    )
