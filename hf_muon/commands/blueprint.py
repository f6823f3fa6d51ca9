"""A model without its weights, and its routes.

In: a config file, a model folder, an adapter folder or a Hub id; settings. Out: the model on the
meta device, in the dtype of its config, and its routes. Only JSON files are read, and code from a
model repository never runs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from hf_muon.config import MuonConfig
from hf_muon.routing.plan import RoutePlan, route
from hf_muon.values import near_path, read_json, require_one_of, sentence

logger = logging.getLogger(__name__)

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "base": "AutoModel",
}


def routed(source: str, optim_args: str, auto: str | None) -> tuple[RoutePlan, MuonConfig]:
    """Return a model's routes, without its weights, and the settings as the Trainer reads them.

    Raises:
        ValueError: As in :func:`build`; or a setting is wrong.
    """
    config = MuonConfig.from_optim_args(optim_args or None)
    return route(build(source, auto), config), config


def require_matrices(routes: RoutePlan) -> None:
    """End the command with exit code 1 if Muon gets no matrix."""
    try:
        routes.require_matrices()
    except ValueError as error:
        typer.echo(f"hf-muon: {error}", err=True)
        raise typer.Exit(1) from error


def check_exists(source: str) -> None:
    """Raise if the source is a path that does not exist; other names may be Hub ids."""
    path = Path(source)
    if not path.exists() and (
        path.is_absolute() or source.startswith(".") or source.endswith(".json")
    ):
        raise ValueError(f"{source!r} does not exist.{near_path(path)}")


def build(source: str, auto: str | None = None, base: str | None = None) -> nn.Module:
    """Build a model on the meta device.

    Args:
        source: Path of a ``config.json``, a folder with one (or with an ``adapter_config.json``),
            or a model id.
        auto: A key of :data:`AUTO_CLASSES`. Default: the class that the config names, else the
            first Auto class that knows the config.
        base: The model under an adapter. Default: the one that the adapter's config names.

    Raises:
        ValueError: The source cannot be read, or names no model that transformers can build.
    """
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # type: ignore[no-untyped-call]
    if auto is not None:
        require_one_of("auto", auto, AUTO_CLASSES)
    if adapter := find_adapter(Path(source)):
        return _with_adapter(*adapter, auto, base)
    config = _config(source)
    try:
        with torch.device("meta"):
            model = _model(config, auto)
    except Exception as error:  # a config is data: it can make a model's __init__ raise anything
        raise ValueError(f"No model can be built from {source!r}: {sentence(error)}") from error
    dtype = getattr(config, "dtype", None)
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def find_adapter(folder: Path) -> tuple[Path, str] | None:
    """Return where the default or only adapter in a folder is, and its name; else None."""
    if (folder / "config.json").is_file():
        return None
    if (folder / "adapter_config.json").is_file():
        return folder, "default"
    named = list(folder.glob("*/adapter_config.json"))
    # PEFT saves a named adapter in a subfolder of that name.
    return (named[0].parent, named[0].parent.name) if len(named) == 1 else None


def _config(source: str) -> Any:
    from transformers import AutoConfig

    check_exists(source)
    path = Path(source)
    if path.exists():
        _check_is_config(path / "config.json" if path.is_dir() else path)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # hub, cache and validation errors have no common base
        hint = (
            " Give a config.json, a model folder, or a model id; without a network "
            "HF_HUB_OFFLINE=1 spares the retries."
        )
        hint = "" if path.exists() else hint
        raise ValueError(f"{source!r} gives no model config: {sentence(error)}{hint}") from error


def _check_is_config(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} holds no config.json.")
    if "model_type" not in read_json(path):
        raise ValueError(f"{str(path)!r} is no model config: it names no model_type.")


def _model(config: Any, auto: str | None) -> nn.Module:
    import transformers

    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if auto is None and isinstance(named, type) and issubclass(named, nn.Module):
        return named(config)
    for name in [auto] if auto else AUTO_CLASSES:
        of_kind = getattr(transformers, AUTO_CLASSES[name])
        if type(config) in of_kind._model_mapping:  # a private name of transformers 5.23
            model: nn.Module = of_kind.from_config(config, trust_remote_code=False)
            return model
    asked = AUTO_CLASSES[auto] if auto else ", ".join(AUTO_CLASSES.values())
    raise ValueError(f"{asked} has no class for {config.model_type!r}.")


def _with_adapter(path: Path, name: str, auto: str | None, base: str | None) -> nn.Module:
    """Build an adapter on the given base model, or on the one that its config names."""
    try:
        import peft
    except ImportError:
        raise ValueError(
            f"{str(path)!r} holds an adapter; python -m pip install peft to route it."
        ) from None
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
    except Exception as error:  # an unreadable file and a wrong field raise different errors
        raise ValueError(f"{str(path)!r} holds no readable adapter: {sentence(error)}") from error
    if others := sorted(one.parent.name for one in path.glob("*/adapter_config.json")):
        logger.warning("%s has other adapters, left out here: %s.", path, ", ".join(others))
    named = base or config.base_model_name_or_path
    if not named:
        raise ValueError(
            f"{str(path)!r} names no base model (base_model_name_or_path): the model was made in "
            "memory. Save the base, or its config.json, in a folder and set "
            "base_model_name_or_path in adapter_config.json to that folder; hf-muon convert takes "
            "it as --model. The routes of a run with Muon are also in its muon_report.json."
        )
    model = build(named, auto)
    config.inference_mode = False
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other initializations read the base weights
    try:
        with torch.device("meta"):
            adapted: nn.Module = peft.get_peft_model(model, config, adapter_name=name)
    except Exception as error:  # as above: the adapter may not fit the base model
        raise ValueError(f"{str(path)!r} does not fit its base: {sentence(error)}") from error
    return adapted
